"""Layers as they are on CUDA also where there is no GPU, with Triton's BatchNorms in the interpreter."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.layers import batch_norm, batch_norm_triton, convolution, pending, twins


def on_triton(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Of all dense features, in small tiles; returns what will be launched, counted by the kernels' names."""
    launched: Counter[str] = Counter()
    plainly = launch.launch

    def fused(x: Tensor) -> bool:
        return type(x) is Tensor and launch.is_dense(x)

    def counted(kernel: Any, *arguments: Any, **options: Any) -> Any:
        launched[kernel.fn.__name__.removesuffix("_kernel")] += 1
        return plainly(kernel, *arguments, **options)

    for module in (batch_norm, pending):
        patch.setattr(module, "fused", fused)
    patch.setattr(twins, "plain_suffices", lambda x: False)
    patch.setattr(convolution, "leaves_out_zero_sums", convolution.has_zero_sums)
    patch.setattr(launch, "launch", counted)
    if not torch.cuda.is_available():
        patch.setattr(batch_norm_triton, "ELEMENTS", 256)
        patch.setattr(batch_norm_triton, "SUMMED", (4, 16))
    return launched
