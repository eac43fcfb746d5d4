"""Arithmetic of an engine: what its networks are computed in, and PyTorch's switches for it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "tf32", "bf16"]


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """PyTorch's switches on CUDA: float32 products and convolutions in TF32 for "tf32" alone, cuDNN's fastest kernels.

    They belong to the process, so that each engine sets its own while it runs, and puts back what was there.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    conv: Any = cudnn.conv  # type: ignore[attr-defined]
    products, convolutions, benchmark = matmul.fp32_precision, conv.fp32_precision, cudnn.benchmark
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set the newer switch alone
        older = "highest"
    # The older switches set the newer ones too; the reverse leaves PyTorch unable to read the older ones.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn.allow_tf32 = precision == "tf32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        cudnn.allow_tf32 = convolutions == "tf32"
        matmul.fp32_precision, conv.fp32_precision, cudnn.benchmark = products, convolutions, benchmark


def layout(precision: Precision) -> torch.memory_format:
    """Of images, features and convolutions: what tensor cores read, or what the user gave."""
    return torch.preserve_format if precision == "fp32" else torch.channels_last


def lay_out(networks: Iterable[nn.Module], precision: Precision) -> None:
    """Lays out the weights of convolutions so in memory, in place: otherwise each call would do it anew."""
    if precision != "fp32":
        for network in networks:
            for p in network.parameters():
                if p.dim() == 4:
                    p.data = p.data.contiguous(memory_format=torch.channels_last)


def images(x: Tensor, precision: Precision) -> Tensor:
    """x as the networks take it."""
    return x.to(torch.bfloat16 if precision == "bf16" else x.dtype, memory_format=layout(precision))
