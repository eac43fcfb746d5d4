"""What there is to compute on."""

import os
import re

import torch

_NAMES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def why_no_gpu() -> str:
    """What keeps PyTorch from a GPU, and what to do; empty where it has one."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built for CPUs alone: install one that is built for CUDA"
    for name in _NAMES:
        if os.environ.get(name) in ("", "-1"):
            return f"{name}={os.environ[name]} hides them"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _in_words(str(error))
    return "PyTorch finds none"


def _in_words(error: str) -> str:
    if "driver on your system is too old" in error:
        found = re.search(r"found version (\d+)", error)
        most = f", which is made for CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10} at most" if found else ""
        return (
            f"the NVIDIA driver is too old{most}, and PyTorch {torch.__version__} is built for CUDA "
            f"{torch.version.cuda}: update the driver, or install a PyTorch for its CUDA"
        )
    if "Found no NVIDIA driver" in error:
        return "there is no NVIDIA driver: install it, or train on the CPU"
    return next(iter(error.strip().splitlines()), "PyTorch does not say why").rstrip(".")
