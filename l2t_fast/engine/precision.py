"""Arithmetic of an engine: what its networks are computed in, and PyTorch's switches for it."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.choices import Precision


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """PyTorch's switches on CUDA: float32 products and convolutions in TF32 for "tf32" alone, cuDNN's fastest kernels.

    They belong to the process, so that each engine sets its own while it runs, and puts back what was there.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    # All that the older switches below change of the newer ones.
    newer = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before, benchmark = [switch.fp32_precision for switch in newer], backends.cudnn.benchmark
    try:
        products, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:  # the user has set the newer switches alone
        products, convolutions = "highest", True
    # The older switches first: the newer alone would leave PyTorch unable to read the older ones.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    backends.cudnn.allow_tf32 = precision == "tf32"
    for switch in newer[2:]:  # without TF32 the older one leaves them to inherit it
        switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        backends.cudnn.allow_tf32 = convolutions
        for switch, value in zip(newer, before, strict=True):
            switch.fp32_precision = value
        backends.cudnn.benchmark = benchmark


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """For trials that compare two passes: float32, and the same bits again wherever PyTorch has kernels that give them.

    Where it has none it would warn, which is silenced; where the user wants an error instead there is one.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    mode, deterministic = torch.get_deterministic_debug_mode(), cudnn.deterministic
    with arithmetic("fp32", device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis")
        try:
            cudnn.benchmark, cudnn.deterministic = False, True  # `arithmetic` puts the first back
            torch.set_deterministic_debug_mode(max(mode, 1))
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            cudnn.deterministic = deterministic


def bfloat16_of_cpu() -> str:
    """The instructions that this CPU multiplies bfloat16 with; "" where it has none, or PyTorch does not know them."""
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16"):
        return "AMX"
    return "AVX512-BF16 without AMX" if has.get("avx512_bf16") else "BF16" if has.get("bf16") else ""


def warning(precision: Precision, device: torch.device) -> str | None:
    """What is said of a precision that has its price on this device."""
    if precision != "bf16" or device.type != "cpu" or bfloat16_of_cpu() == "AMX":
        return None
    has = f"has {bfloat16_of_cpu()}" if bfloat16_of_cpu() else "is not known to have instructions for it"
    return f"bf16 may be slower than fp32 on this CPU, which {has}: `l2t-fast doctor` measures it"


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
