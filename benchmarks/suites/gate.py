"""The regression gate, for CI on a CPU: `python -m benchmarks gate`.

    counts    FLOPs, aten calls, launches and bytes kept for backward of an iteration, which no noise reaches: at most
              those of expectations.json, and FLOPs of the imagenet case within fixed bounds in units of one forward and
              backward pass of the cross entropy (the official code spends 19.3 an iteration)
    cuda      launches and bytes of an iteration on the path of CUDA, counted on this CPU (`measure.traffic`): likewise
    times     of the engine, in units of the reference's, turn by turn: worse only where the whole interval that this
              run measured lies above the whole interval of expectations.json

`python -m benchmarks gate --update` measures anew and writes expectations.json, which is read before it is committed.
"""

import argparse
import copy
import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CASES, Case
from benchmarks.measure import timing
from benchmarks.measure.traffic import traffic
from benchmarks.rows import say
from l2t_fast import Engine
from l2t_fast.engine.counts import count

EXPECTATIONS = Path(__file__).parent / "expectations.json"
CPU = torch.device("cpu")
# Small enough for CI; counts and ratios of them tell as much.
TIMED = {"tiny": replace(CASES["tiny"], batch=8), "cifar": replace(CASES["cifar"], batch=4, target_width=0.25)}
ON_CUDA = ("tf32", "bf16")
ROUNDS = 9
SLACK = {
    "flops": 1.001,
    "calls": 1.01,
    "launches": 1.01,
    "saved_bytes": 1.01,
    "bytes": 1.01,
}  # versions of PyTorch differ a little
# In units of one forward and backward pass: whole iteration with one source forward, meta-gradient without it.
UNITS = {"step": 12.3, "meta_gradient": 10.4}


@dataclass(frozen=True)
class Interval:
    """Of the median of some turns: with nine of them it lies outside in one case of 25, whatever their distribution."""

    low: float
    median: float
    high: float


def interval(ratios: list[float]) -> Interval:
    """Second least, median and second greatest."""
    ordered = sorted(ratios)
    return Interval(ordered[1], ordered[len(ordered) // 2], ordered[-2])


def engine_counts(case: Case) -> dict[str, int]:
    """Of one `Engine.step`, after a first one."""
    engine = Engine(case.learner(CPU, torch.float32), mode="eager", inner_steps=case.inner_steps)
    x, y = case.images(0, CPU, torch.float32)
    engine.step(x, y)
    counts = asdict(count(functools.partial(engine.step, x, y)))
    return {name: counts[name] for name in SLACK if name in counts}


def time_ratio(case: Case, rounds: int = ROUNDS) -> Interval:
    """Time of `Engine.step` over that of the reference."""
    learner = case.learner(CPU, torch.float32)
    state = {
        part: copy.deepcopy(getattr(learner, part).state_dict()) for part in ("target", "projections", "what", "where")
    }
    engine = Engine(learner, mode="eager", inner_steps=case.inner_steps)
    reference = case.reference(CPU, torch.float32, state)
    x, y = case.images(0, CPU, torch.float32)
    calls = {"engine": lambda: engine.step(x, y), "reference": lambda: reference.step(x, y)}
    for call in calls.values():
        call()
    times = timing.milliseconds(calls, rounds, CPU)
    return interval([ours / theirs for ours, theirs in zip(times["engine"], times["reference"], strict=True)])


def imagenet_units() -> dict[str, float]:
    """FLOPs of the engine on the imagenet case, in forward and backward passes of the cross entropy.

    A batch of two images stands for all: every term is proportional to the number of images.
    """
    case = replace(CASES["imagenet"], batch=2)
    learner = case.learner(CPU, torch.float32)
    _, target = case.networks(CPU, torch.float32)
    x, y = case.images(0, CPU, torch.float32)
    engine = Engine(learner, mode="eager", inner_steps=case.inner_steps)

    def flops(call: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    unit = flops(lambda: F.cross_entropy(target(x), y).backward())
    source = flops(lambda: learner.source_features(x))
    return {
        "step": flops(lambda: engine.step(x, y)) / unit,
        "meta_gradient": (flops(lambda: engine.meta_gradient(x, y)) - source) / unit,
    }


def measure() -> dict[str, Any]:
    """Everything that the gate looks at. One thread: ratios of several depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "counts": {name: engine_counts(case) for name, case in TIMED.items()},
            "cuda": {precision: traffic(TIMED["cifar"], precision) for precision in ON_CUDA},
            "time": {name: asdict(time_ratio(case)) for name, case in TIMED.items()},
            "imagenet": imagenet_units(),
        }
    finally:
        torch.set_num_threads(threads)


def complaints(measured: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What has become worse, a sentence each."""
    found = []
    counted = [
        (title + case, counts, expected[kind][case])
        for kind, title in (("counts", ""), ("cuda", "on CUDA, "))
        for case, counts in measured.get(kind, {}).items()
    ]
    for case, counts, before in counted:
        for name, value in counts.items():
            if value > SLACK[name] * before[name]:
                found.append(f"{case}: {name} of an iteration rose from {before[name]} to {value}.")
    for case, ratio in measured["time"].items():
        then, now = Interval(**expected["time"][case]), Interval(**ratio)
        if now.low > then.high:
            found.append(
                f"{case}: an iteration takes {now.median:.2f} ({now.low:.2f} to {now.high:.2f}) of the reference's "
                f"time, it took {then.median:.2f} ({then.low:.2f} to {then.high:.2f})."
            )
    for name, value in measured["imagenet"].items():
        if not value <= UNITS[name]:
            found.append(f"imagenet: {name} spends {value:.2f} forward and backward passes, more than {UNITS[name]}.")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--update", action="store_true", help="write expectations.json anew")


def run(arguments: argparse.Namespace) -> int:
    """Prints what was measured and what became worse; the exit code."""
    measured = measure()
    say(json.dumps(measured, indent=2))
    if arguments.update:
        EXPECTATIONS.write_text(
            json.dumps({name: measured[name] for name in ("counts", "cuda", "time")}, indent=2) + "\n"
        )
        say(f"written to {EXPECTATIONS.name}")
    found = complaints(measured, json.loads(EXPECTATIONS.read_text()))
    for complaint in found:
        say(complaint)
    say("nothing became worse" if not found else "if that is meant, `python -m benchmarks gate --update` says so")
    return len(found) > 0
