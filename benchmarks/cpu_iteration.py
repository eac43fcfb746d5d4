"""Iterations a second on a CPU, engine against reference, in one run: `python -m benchmarks.cpu_iteration`.

The cifar case: ResNet32 -> VGG9-bn, 15 pairs, T = 2, fp32. Both are timed turn by turn, so that a busy machine slows
both; first their meta-gradients must agree in float64. Writes a JSON line to benchmarks/results/.
"""

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.metadata import commit
from l2t_fast import L2T, Engine
from l2t_fast.models import build_model, default_layers
from l2t_fast.reference import Reference

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-9  # relative, float64


def contenders(batch: int, dtype: torch.dtype) -> tuple[Engine, Reference, Tensor, Tensor]:
    """Both sides of the comparison with the same networks, and a batch (x, y)."""
    torch.manual_seed(0)
    source, target = build_model("resnet32", 200).to(dtype), build_model("vgg9_bn", 10).to(dtype)
    x, y = torch.randn(batch, 3, 32, 32, dtype=dtype), torch.randint(10, (batch,))
    layers: dict[str, Any] = {
        "source_layers": default_layers("resnet32", source),
        "target_layers": default_layers("vgg9_bn", target),
    }
    learner = L2T(copy.deepcopy(source), copy.deepcopy(target), example=x, **layers)
    reference = Reference(source, target, pairs=[tuple(p) for p in learner.pairs], example=x, **layers)
    for heads in ("projections", "what", "where"):
        getattr(reference, heads).load_state_dict(getattr(learner, heads).state_dict())
    return Engine(learner), reference, x, y


def meta_gradient_error(batch: int) -> float:
    """Largest relative difference of the meta-gradients in float64, after two iterations of each."""
    engine, reference, x, y = contenders(batch, torch.float64)
    for _ in range(2):
        engine.step(x, y)
        reference.step(x, y)
    ours, theirs = engine.meta_gradient(x, y), reference.meta_gradient(x, y)
    scale = max(g.norm() for g in theirs.values())
    return max(((ours[name] - g).norm() / scale).item() for name, g in theirs.items())


def seconds(step: Callable[[Tensor, Tensor], Any], x: Tensor, y: Tensor) -> float:
    start = perf_counter()
    step(x, y)
    return perf_counter() - start


def gigaflops(step: Callable[[Tensor, Tensor], Any], x: Tensor, y: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        step(x, y)
    return counter.get_total_flops() / 1e9


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images in a batch (default 32)")
    parser.add_argument("--rounds", type=int, default=9, help="timed iterations of each side (default 9)")
    arguments = parser.parse_args()

    error = meta_gradient_error(batch=4)
    print(f"meta-gradient, float64: relative difference {error:.1e} (at most {TOLERANCE:.0e})")
    if not error <= TOLERANCE:
        raise SystemExit("the meta-gradients differ: no times are reported for a wrong answer")

    engine, reference, x, y = contenders(arguments.batch, torch.float32)
    sides = {"engine": engine.step, "reference": reference.step}
    for step in sides.values():
        seconds(step, x, y)  # warm-up: threads, buffers, momentum
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(arguments.rounds):
        for name, step in sides.items():
            times[name].append(seconds(step, x, y))
        print(f"round {i + 1}/{arguments.rounds}: " + ", ".join(f"{name} {t[-1]:.3f} s" for name, t in times.items()))
    ratios = [theirs / ours for ours, theirs in zip(times["engine"], times["reference"], strict=True)]
    row = {
        "benchmark": "cpu_iteration",
        "case": "cifar: ResNet32 -> VGG9-bn, 15 pairs, T=2, fp32",
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "speedup_median": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
        **{f"{name}_seconds_median": round(statistics.median(t), 4) for name, t in times.items()},
        **{f"{name}_gflop": round(gigaflops(step, x, y), 1) for name, step in sides.items()},
        "meta_gradient_error_float64": error,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "cpu_iteration.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(
        f"engine {row['engine_seconds_median']} s, reference {row['reference_seconds_median']} s an iteration: "
        f"{row['speedup_median']}x (median of {arguments.rounds} pairs); written to {path}"
    )


if __name__ == "__main__":
    main()
