"""The launcher that a table asks for, on what device its cells run, and how many of them at a time."""

import os
from pathlib import Path

import torch

from l2t_fast.errors import L2TError
from l2t_fast.runs.build import find_device
from l2t_fast.runs.device import cores
from l2t_fast.runs.launchers.base import Launcher
from l2t_fast.runs.launchers.local import Local
from l2t_fast.runs.launchers.ray_cluster import OnRay
from l2t_fast.runs.launchers.submitit_jobs import Submitit
from l2t_fast.settings.options import TableConfig


def cells_device(config: TableConfig) -> torch.device:
    """What the cells run on: of other machines what the settings say, as this one may be without a GPU.

    Raises:
        L2TError: there is no GPU here; a share of one is asked for on a CPU, or of submitit; options for submitit
            without it.
    """
    elsewhere = config.launcher != "local"
    asked = config.device == "cuda" or (config.device == "auto" and config.gpus_per_cell is not None)
    device = torch.device("cuda") if elsewhere and asked else find_device(config.device)
    if config.gpus_per_cell is not None and device.type != "cuda":
        raise L2TError("--gpus-per-cell divides GPUs, and the cells run on the CPU: leave it out.")
    if config.submitit and config.launcher != "submitit":
        raise L2TError("--submitit has options of --launcher submitit: give that, too, or leave them out.")
    if config.launcher == "submitit" and config.gpus_per_cell not in (None, 1):
        raise L2TError(
            "Slurm gives whole GPUs: leave out --gpus-per-cell or, where the cluster has shards, give --device cuda "
            "and --submitit slurm_gres=shard:1."
        )
    return device


def choose(config: TableConfig, folder: Path, cells: int, device: torch.device) -> tuple[Launcher, int, int]:
    """(launcher, how many side by side, CPU threads of each).

    Here it is by default one a core, among which the cores are divided, and as many as all visible GPUs take; elsewhere
    the scheduler decides how many of the cells run.

    Raises:
        L2TError: the launcher is not installed, or has no such device or option.
    """
    share = config.gpus_per_cell or 1.0
    if config.launcher == "ray":
        return OnRay(share if device.type == "cuda" else 0), config.jobs or max(1, cells), config.threads or 1
    if config.launcher == "submitit":
        sharded = any(option.startswith("slurm_gres=") for option in config.submitit)
        gpus = int(device.type == "cuda" and not sharded)
        launcher = Submitit(folder / "submitit", gpus, config.submitit)
        return launcher, config.jobs or max(1, cells), config.threads or 1
    devices = _visible() if device.type == "cuda" else []
    most = len(devices) * int(1 / share + 1e-9) or max(1, min(cores() // (config.threads or 1), cells))
    jobs = config.jobs or most
    return Local(devices), jobs, config.threads or max(1, cores() // jobs)


def _visible() -> list[str]:
    """The GPUs, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(i) for i in range(count)]
