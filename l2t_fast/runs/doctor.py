"""What is installed, what will compute, and what is in the way of a training."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from l2t_fast.choices import Precision
from l2t_fast.engine.memory import free_memory
from l2t_fast.engine.precision import arithmetic, bfloat16_of_cpu
from l2t_fast.environment import PATIENT, version_of
from l2t_fast.errors import MachineError
from l2t_fast.kernels import launch
from l2t_fast.kernels.matching import aten, ops
from l2t_fast.runs.device import cores, why_no_gpu

# What setup.py calls extra, and what each is for.
EXTRAS = {
    "digits": ("scikit-learn", "the data set of `l2t-fast train` without arguments"),
    "timm": ("timm", "networks of timm"),
    "lightning": ("lightning", "training in Lightning"),
    "accelerate": ("accelerate", "training in Hugging Face Accelerate"),
    "tensorboard": ("tensorboard", "watching in TensorBoard"),
    "onnx": ("onnx onnxscript", "--export onnx"),
    "ray": ("ray", "many runs with Ray"),
    "submitit": ("submitit", "many runs with Slurm"),
}
_NEEDED = ("l2t-fast", "torch", "torchvision", "triton", "numpy", "scipy", "safetensors", "matplotlib", "rich", "tyro")
_LEAST_ROOM = 2**28  # bytes on the disk: a run of small networks


class Finding(NamedTuple):
    """A line; `wrong` says in a few words what is in the way, if anything is."""

    name: str
    value: str
    wrong: str = ""


def examine(runs: Path, console: Console) -> None:
    """Prints what there is.

    Raises:
        MachineError: something is in the way of a training.
    """
    wrong: list[str] = []
    for title, findings in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("kernels", _kernels()),
        ("memory and disk", [*_memory(), *_disk(runs)]),
        ("threads", _threads()),
        ("optional packages", _extras()),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for finding in findings:
            table.add_row(finding.name, finding.value + (f": {finding.wrong}" if finding.wrong else ""))
            wrong += [finding.wrong] if finding.wrong else []
        console.print(table)
    if wrong:
        raise MachineError(f"in the way of a training: {'; '.join(wrong)}.")
    console.print("nothing is in the way of a training", highlight=False)


def _versions() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} on {platform.platform(terse=True)}, {sys.executable}")
    for name in _NEEDED:
        yield Finding(name, version_of(name) or "not installed")
    built = torch.version.cuda or torch.version.hip
    yield Finding("torch is built for", f"{'ROCm' if torch.version.hip else 'CUDA'} {built}" if built else "CPUs alone")


def _devices() -> Iterator[Finding]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "CPU", f"{platform.processor() or platform.machine()}, {capability}, {cores()} cores for this process"
    )
    why = why_no_gpu()
    if why:
        # A card that is there and cannot be used is in the way; none, or a PyTorch without CUDA, is a choice.
        wrong = why if "too old" in why else ""
        yield Finding("GPU", "none" if wrong else f"none ({why})", wrong)
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        arch, _ = launch.device_properties(torch.device("cuda", number))
        yield Finding(f"GPU {number}", f"{properties.name}, {arch}, {properties.multi_processor_count} multiprocessors")


def _kernels() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for precision in ("fp32", "tf32", "bf16"):
        yield Finding(f"matching, {precision}", _matching(precision, device))
    if device.type != "cuda":
        yield Finding("products in bf16", _bfloat16(*(_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))))
        layers = "ATen: Triton's are for GPUs"
    else:
        layers = "Triton, in every precision" if launch.TRITON else "ATen: the package triton is not installed"
    yield Finding("BatchNorm, max-pool, SGD", layers)


def _bfloat16(float32: float, bfloat16: float) -> str:
    """What to do about bf16 on this CPU, by the seconds of a product in both."""
    found = f"{bfloat16_of_cpu() or 'no instructions known'}, {float32 / bfloat16:.1f} times as fast as in fp32"
    return f"{found}: use {'bf16' if bfloat16 < float32 else 'fp32, bf16 saves memory alone'}"


def _seconds(dtype: torch.dtype) -> float:
    """Of a product of matrices, in a hundredth of a second or two."""
    x = torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(5):
        start = perf_counter()
        x @ x
        times.append(perf_counter() - start)
    return min(times)


def _matching(precision: Precision, device: torch.device) -> str:
    feature = torch.zeros(1, 1, 1, 1, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    with arithmetic(precision, device):
        if ops.implementation(feature) is not aten:
            return "Triton"
    if device.type != "cuda":
        return "ATen: Triton's are for GPUs"
    return "ATen: cuBLAS's products are better without tensor cores" if launch.TRITON else "ATen: there is no triton"


def _memory() -> Iterator[Finding]:
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices if torch.cuda.is_available() else devices[:1]:
        free, total = free_memory(device)
        told = f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}" if total else "the system does not say"
        yield Finding("memory" if device.type == "cpu" else f"memory of GPU {device.index}", told)


def _disk(runs: Path) -> Iterator[Finding]:
    place = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    told = f"{runs} " + ("can be written" if place == runs.absolute() else f"can be made in {place}")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
    except OSError as error:
        why = f"{place} cannot be written ({error.strerror}), give another --runs"
        yield Finding("folder of runs", f"{runs}", why)
        return
    free = shutil.disk_usage(place).free
    few = f"only {free:,} bytes of disk are free in {place}, make room" if free < _LEAST_ROOM else ""
    yield Finding("folder of runs", f"{told}, {free / 2**30:.1f} GiB free", few)


def _threads() -> Iterator[Finding]:
    yield Finding("of PyTorch", f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} between")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *PATIENT):
        yield Finding(name, os.environ.get(name, "not set"))


def _extras() -> Iterator[Finding]:
    for extra, (packages, purpose) in EXTRAS.items():
        versions = [version_of(package) for package in packages.split()]
        there, missing = ", ".join(map(str, versions)), f"not installed; for {purpose}: pip install 'l2t-fast[{extra}]'"
        yield Finding(packages, there if all(versions) else missing)
