"""The ways to run an iteration, each made ready from one state.

reference   the paper in plain PyTorch (l2t_fast/reference.py)
official    the authors' own code, from a checkout of it; "tf32": with TF32 convolutions, PyTorch's default on a GPU
engine      l2t_fast.Engine in its modes, precisions and ways with memory
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import Case, State
from benchmarks.contenders import official
from benchmarks.measure.rates import set_precision
from l2t_fast import Engine
from l2t_fast.choices import Memory, Mode, Precision
from l2t_fast.engine import capture

MODES: tuple[Mode, ...] = ("graph", "eager", "compile")
PRECISIONS: tuple[Precision, ...] = ("bf16", "tf32", "fp32")
CUDA_WARM_UP = 10  # iterations: a graph is captured after the first few

Gradient = dict[str, Tensor]
Iteration = Callable[[Tensor, Tensor], Any]  # on a batch (x, y)


@dataclass(frozen=True)
class Way:
    """A way to run an iteration."""

    by: str = "engine"
    mode: Mode = "eager"
    precision: Precision = "fp32"
    memory: Memory = "save"

    def __str__(self) -> str:
        words = [self.mode] * (self.by == "engine") + [self.precision]
        return " ".join([self.by, *words, *([] if self.memory == "save" else [self.memory])])


REFERENCE = Way("reference")
# What speedups are over, by the name that rows give it.
BASELINES = {REFERENCE: "reference", Way("official"): "official", Way("official", precision="tf32"): "official_tf32"}


@dataclass(frozen=True)
class Contender:
    """One way, ready to run. `meta_gradient` takes one step from the state of the start and gives what φ got."""

    step: Iteration
    meta_gradient: Callable[[Tensor, Tensor], Gradient]
    close: Callable[[], None] = lambda: None  # gives back what it holds
    replayed: Callable[[], bool] = lambda: False  # whether the step that `meta_gradient` took last was a replay


def contender(
    way: Way, case: Case, state: State, device: torch.device, in_float64: bool, checkout: Path | None
) -> Contender:
    """Made anew, at `state`, without momentum."""
    dtype = torch.float64 if in_float64 else torch.float32
    if way.by == "engine":
        return _engine(way, case, state, device, dtype)
    if way.by == "reference":
        return _reference(way, case, state, device, dtype)
    return _official(way, case, state, device, dtype, checkout)


def _engine(way: Way, case: Case, state: State, device: torch.device, dtype: torch.dtype) -> Contender:
    learner = case.learner(device, dtype, state)
    options: dict[str, Any] = {"mode": way.mode, "precision": way.precision, "memory": way.memory}
    engine = Engine(learner, inner_steps=case.inner_steps, meta_weight_decay=0.0, **options)
    start = copy.deepcopy(engine.state_dict())
    # Moments that are there and zero: without them the engine would drop its graphs where `start` is loaded.
    start["adam"]["state"] = {
        i: {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for i, p in enumerate(start["phi"].values())
    }
    engine.load_state_dict(start)
    warm_up = 0 if way.mode == "eager" else capture.WARM_UP + 1  # so that what is checked is what is timed, a replay
    replays: list[object] = []  # of the checked step

    def meta_gradient(x: Tensor, y: Tensor) -> Gradient:
        nonlocal warm_up
        for _ in range(warm_up):
            engine.step(x, y)
        warm_up = 0
        engine.load_state_dict(start)
        replays.clear()
        with _noting_replays(replays):
            engine.step(x, y)
        moments = engine.state_dict()["adam"]["state"]  # after one step from zero: exp_avg = (1 - 0.9) gradient
        return {name: moments[i]["exp_avg"] / 0.1 for i, name in enumerate(start["phi"])}

    return Contender(engine.step, meta_gradient, replayed=lambda: len(replays) == 1)


@contextmanager
def _noting_replays(replays: list[object]) -> Iterator[None]:
    """Notes each graph that is replayed meanwhile."""
    replay = capture.CudaGraph.replay

    def noted(graph: Any) -> None:
        replays.append(graph)
        replay(graph)

    with mock.patch.object(capture.CudaGraph, "replay", noted):
        yield


def _reference(way: Way, case: Case, state: State, device: torch.device, dtype: torch.dtype) -> Contender:
    reference = case.reference(device, dtype, state)

    def step(x: Tensor, y: Tensor) -> Any:
        with pytorch_precision(way.precision, device):
            return reference.step(x, y)

    def meta_gradient(x: Tensor, y: Tensor) -> Gradient:
        fresh = case.reference(device, dtype, state)
        with pytorch_precision(way.precision, device):
            fresh.step(x, y)
        return {name: p.grad.clone() for name, p in fresh.phi.items() if p.grad is not None}

    return Contender(step, meta_gradient)


def _official(
    way: Way, case: Case, state: State, device: torch.device, dtype: torch.dtype, checkout: Path | None
) -> Contender:
    theirs = official.Official(checkout, case, state, device, dtype)

    def step(x: Tensor, y: Tensor) -> None:
        with official_precision(way.precision):
            theirs.step(x, y)

    def meta_gradient(x: Tensor, y: Tensor) -> Gradient:
        with official_precision(way.precision):
            return theirs.meta_gradient(x, y)

    return Contender(step, meta_gradient, theirs.close)


@contextmanager
def official_precision(precision: str) -> Iterator[None]:
    """Float32 products as PyTorch's default has them, in full; convolutions in TF32, its default on a GPU, or in full.

    The switches belong to the process: they are set while the thread of the official code goes through its step.
    """
    set_precision("fp32")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        set_precision("fp32")


@contextmanager
def pytorch_precision(precision: str, device: torch.device) -> Iterator[None]:
    """How plain PyTorch computes in a precision: bf16 by autocast."""
    set_precision(precision)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        set_precision("fp32")


def ways_of(
    device: torch.device,
    checkout: Path | None,
    modes: Sequence[Mode],
    precisions: Sequence[Precision] = PRECISIONS,
) -> list[Way]:
    """All ways that the device may have, the most telling first; on a CPU neither TF32 nor graphs."""
    if device.type == "cpu":
        ours = [Way(), Way(memory="recompute"), *(Way(precision=p) for p in precisions if p == "bf16")]
        return [REFERENCE, *([Way("official")] if checkout else []), *ours]
    theirs: list[Precision] = [p for p in ("fp32", "tf32") if checkout and p in precisions]  # it knows no other
    official_too = [Way("official", precision=p) for p in theirs]
    ways = [REFERENCE, *official_too, *(Way(mode=mode, precision=p) for mode in modes for p in precisions)]
    if "eager" in modes:
        ways += [Way(memory="recompute"), *(Way("reference", precision=p) for p in precisions if p != "fp32")]
    return ways
