"""What all Triton paths share on the host: whether Triton is there, what it may be given, the device, the launch.

Its functions are called as `launch.…`, so that whoever counts or records launches finds all of them in one place.
"""

import functools
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None  # it is for Linux


def is_dense(x: Tensor) -> bool:
    """Whether x lies in memory without gaps, contiguous or channels_last: what kernels read and write as it is."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


@functools.cache
def device_properties(device: torch.device) -> tuple[str, int]:
    """(architecture as `matching.blocks.BLOCKS` names it, multiprocessors)."""
    if device.type != "cuda":
        return "interpreter", 8
    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    return arch, properties.multi_processor_count


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], place: Tensor, warps: int, stages: int = 3
) -> Any:
    """Launches `kernel` on the device of `place`, and says what Triton made of it.

    The default of enable_fp_fusion changes in Triton 3.10.
    """
    with torch.cuda.device_of(place):
        return kernel[grid](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
