"""What a training runs on, in words and numbers, noted beside what comes out."""

import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from l2t_fast.files import writing


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device, the threads and the versions that decide how fast it goes, and to which bit."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        **{package: _version(package) for package in ("triton", "torchvision")},
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def note_machine(folder: Path, device: torch.device, **more: Any) -> None:
    """A line of folder/environment.jsonl: a command has begun to train there.

    Raises:
        MachineError: the disk is full, or the file may not be written.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row = {**describe_machine(device), "l2t-fast": _version("l2t-fast"), "system": platform.platform(), "time": now}
    path = folder / "environment.jsonl"
    with writing(path), path.open("a") as file:
        file.write(json.dumps(row | more) + "\n")


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
