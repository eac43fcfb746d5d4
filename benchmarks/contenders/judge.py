"""Who is right: meta-gradients against the reference in float64, from a state in which they are not chaotic.

In float64 a contender must agree with the reference (EXACT). In its own precision its error may be TOLERANCE times
PyTorch's own in that precision; in float32 an error below ROUNDING will do as well, since at that size the ratio of two
errors is a matter of chance.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders.ways import REFERENCE, Contender, Gradient, Way, contender
from benchmarks.rows import Row

EXACT = 1e-9  # relative, float64
TOLERANCE = 1.5  # times PyTorch's own error in the same precision
ROUNDING = 5e-6  # relative, of float32 in whatever order, past the early chaos (CONTRIBUTING.md)
BATCHES = 2  # that a contender is compared on
CHECK_BATCH = 4  # images of each on a CPU; on a GPU as many as are timed


def relative_error(tensors: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """‖x − exact‖ / ‖exact‖ over all tensors."""
    pairs = [(x.double(), e.double()) for x, e in zip(tensors, exact, strict=True)]
    difference = sum(float((x - e).square().sum()) for x, e in pairs)
    return math.sqrt(difference / sum(float(e.square().sum()) for _, e in pairs))


def gradient_error(gradient: Gradient, exact: Gradient) -> float:
    """Relative, over all of φ."""
    if gradient.keys() != exact.keys():
        raise ValueError(f"parameters differ: {sorted(gradient.keys() ^ exact.keys())}")
    return relative_error([gradient[name] for name in exact], exact.values())


class Judge:
    """Compares contenders with the reference in float64."""

    def __init__(self, case: Case, device: torch.device, batches: int = BATCHES) -> None:
        self.case = case if device.type == "cuda" else replace(case, batch=min(case.batch, CHECK_BATCH))
        self.device = device
        self.state = case.warm_state(device)
        self._seeds = range(batches)
        exact = contender(REFERENCE, self.case, self.state, device, True, None)
        self._exact = [exact.meta_gradient(*self.images(seed, torch.float64)) for seed in self._seeds]
        self._usual: dict[str, float] = {}  # PyTorch's own error in each precision

    def images(self, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.case.images(seed, self.device, dtype)

    def error(self, one: Contender, dtype: torch.dtype = torch.float32) -> float:
        """Median over the batches; of float64 the first will do, as its error is no matter of chance."""
        seeds = self._seeds if dtype == torch.float32 else self._seeds[:1]
        gradients = [one.meta_gradient(*self.images(seed, dtype)) for seed in seeds]
        return statistics.median(gradient_error(g, e) for g, e in zip(gradients, self._exact, strict=False))

    def usual_error(self, precision: str) -> float:
        if precision not in self._usual:
            plain = contender(Way("reference", precision=precision), self.case, self.state, self.device, False, None)
            self._usual[precision] = self.error(plain)
        return self._usual[precision]

    def verdict(self, way: Way, one: Contender, double: Contender | None) -> Row:
        """What a row says of its correctness; `double` is the same way in float64, where that is to be had."""
        usual = self.usual_error(way.precision)
        if way.by == "reference":  # what the others are held against
            return {"error": usual, "error_pytorch": usual, "error_float64": 0.0, "correct": True}
        error = self.error(one)
        rounding = way.precision == "fp32" and error <= ROUNDING
        row = {"error": error, "error_pytorch": usual, "correct": error <= TOLERANCE * usual or rounding}
        if double is not None:
            row["error_float64"] = self.error(double, torch.float64)
            row["correct"] &= row["error_float64"] <= EXACT
        return row


def double(way: Way, judge: Judge, checkout: Path | None = None) -> Contender | None:
    """The same way in float64; not of low precisions, nor where it takes another compilation."""
    if way.precision != "fp32" or way.mode == "compile":
        return None
    return contender(way, judge.case, judge.state, judge.device, True, checkout)
