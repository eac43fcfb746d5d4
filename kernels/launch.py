"""The one place where Triton kernels are launched."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], place: Tensor, warps: int, stages: int = 3
) -> None:
    """Launches `kernel` on the device of `place`. The default of enable_fp_fusion changes in Triton 3.10."""
    with torch.cuda.device_of(place):
        kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
