"""Who is right: meta-gradients against the reference in float64, from a state in which they are not chaotic.

In float64 a contender must agree with the reference (EXACT). In its own precision its error may be TOLERANCE times
PyTorch's own in that precision; in float32 an error below ROUNDING will do as well, since at that size the ratio of two
errors is a matter of chance.

That is judged on few images, by contenders of their own. What is timed has another size, so another graph and, under
torch.compile, other code: it must in addition be a replay, of which `replay` sees that it computes what launches do.
"""

import gc
import math
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders.ways import REFERENCE, Contender, Gradient, Way, contender
from benchmarks.rows import Row

EXACT = 1e-9  # relative, float64
TOLERANCE = 1.5  # times PyTorch's own error in the same precision
ROUNDING = 5e-6  # relative, of float32 in whatever order, past the early chaos (CONTRIBUTING.md)
# Batches that a contender is compared on: the median of an odd number forgives some at a kink. A GPU takes more of them
# while the float64 of all has taken less than SPARE seconds.
BATCHES, MOST, SPARE = 3, {"cpu": 3, "cuda": 9}, 20.0
FEW = 2  # algorithms of cuDNN: the first may refuse
CHECK_BATCH = {"cpu": 4, "cuda": 8}  # images of each: in float64, all that are timed would take minutes


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


@contextmanager
def first_algorithms(device: torch.device) -> Iterator[None]:
    """cuDNN takes the first algorithm, not the fastest of many: for shapes that are run a few times and never timed.

    The engine switches cuDNN's benchmark on while it runs: there it may look at a few.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.benchmark_limit
    cudnn.benchmark, cudnn.benchmark_limit = False, FEW
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before


class Judge:
    """Compares contenders with the reference in float64."""

    def __init__(self, case: Case, device: torch.device, batches: int | None = None) -> None:
        self.case = replace(case, batch=min(case.batch, CHECK_BATCH[device.type]))
        self.device = device
        with first_algorithms(device):
            self.state = case.warm_state(device)
            exact = contender(REFERENCE, self.case, self.state, device, True, None)
            self._exact: list[Gradient] = []
            least, most = (batches, batches) if batches else (BATCHES, MOST[device.type])
            start = perf_counter()
            for seed in range(most):
                if seed < least or perf_counter() - start < SPARE:
                    self._exact.append(exact.meta_gradient(*self.images(seed, torch.float64)))
        self._seeds = range((len(self._exact) - 1) // 2 * 2 + 1)
        self._usual: dict[str, float] = {}  # PyTorch's own error in each precision
        self._launched: dict[tuple[Way, Case], Gradient] = {}  # by engines in mode eager, on all images

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

    def verdict(self, way: Way, checkout: Path | None = None) -> Row:
        """What a row says of its correctness: its error, and that in float64, except of low precisions.

        Under "compile" that of the launches which `replay` compares it with: it would have to be compiled once more.
        """
        with first_algorithms(self.device):
            usual, judged = self.usual_error(way.precision), {"judged_on": len(self._seeds)}
            if way.by == "reference":  # what the others are held against
                return {"error": usual, "error_pytorch": usual, "error_float64": 0.0, "correct": True, **judged}
            error = self._error_of(way, checkout, torch.float32)
            row: Row = {"error": error, "error_pytorch": usual, **judged}
            row["correct"] = self._is_rounding(error, way.precision)
            if way.precision == "fp32" and way.mode != "compile":
                row["error_float64"] = self._error_of(way, checkout, torch.float64)
                row["correct"] &= row["error_float64"] <= EXACT
        return row

    def replay(self, way: Way, one: Contender, case: Case) -> Row:
        """Whether the checked step of `one` was a replay, and its distance from launches, on all images of `case`."""
        batch = case.images(0, self.device, torch.float32)
        launched = replace(way, mode="eager")
        if (launched, case) not in self._launched:
            twin = contender(launched, case, self.state, self.device, False, None)
            self._launched[launched, case] = twin.meta_gradient(*batch)
            del twin
            gc.collect()  # its memory is the other's
        error = gradient_error(one.meta_gradient(*batch), self._launched[launched, case])
        replayed = one.replayed()
        right = replayed and self._is_rounding(error, way.precision)
        return {"replayed": replayed, "error_replay": error, "correct": right}

    def _error_of(self, way: Way, checkout: Path | None, dtype: torch.dtype) -> float:
        """Of a contender of its own, on few images."""
        way = replace(way, mode="eager") if way.mode == "compile" else way
        one = contender(way, self.case, self.state, self.device, dtype == torch.float64, checkout)
        try:
            return self.error(one, dtype)
        finally:
            one.close()

    def _is_rounding(self, error: float, precision: str) -> bool:
        """No further from what is right than PyTorch's own rounding, or than float32's in whatever order."""
        return error <= TOLERANCE * self.usual_error(precision) or (precision == "fp32" and error <= ROUNDING)
