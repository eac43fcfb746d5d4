"""Times whole iterations: `python -m benchmarks.suites.iterations`.

    reference   the paper in plain PyTorch (l2t_fast/reference.py)
    official    the authors' own code, from a checkout of it (`--official`)
    engine      l2t_fast.Engine in its modes, precisions and ways with memory

Every contender's meta-gradient, taken from a step like the one that is timed, is first compared with float64 on
several batches, from a state in which it is not chaotic. In float64 it must agree with the reference (EXACT). In its
own precision its error may be TOLERANCE times PyTorch's own in that precision; in float32 an error below ROUNDING will
do as well, since at that size the ratio of two errors is a matter of chance. A contender that fails is timed, but gets
no speedup.
"""

import copy
import functools
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks import rows as results
from benchmarks.cases import Case, State
from benchmarks.contenders import libraries as others
from benchmarks.contenders import official
from benchmarks.measure import floors, timing
from benchmarks.measure.counts import count
from benchmarks.measure.telemetry import Telemetry
from benchmarks.rows import Row, name_of, say, unavailable
from l2t_fast import Engine
from l2t_fast.choices import Memory, Mode, Precision

EXACT = 1e-9  # relative, float64
TOLERANCE = 1.5  # times PyTorch's own error in the same precision
ROUNDING = 5e-6  # relative, of float32 in whatever order, past the early chaos (CONTRIBUTING.md)
BATCHES = 2  # that a contender is compared on
CHECK_BATCH = 4  # images of each on a CPU; on a GPU as many as are timed
CUDA_WARM_UP = 10  # iterations: a graph is captured after the first few
MODES: tuple[Mode, ...] = ("graph", "eager", "compile")
SWEEP_BATCH = (0.5, 2)  # of the case's own
SWEEP_ROUNDS = 3
REPEAT = 2  # iterations in a row that a turn on a GPU times
ENERGY_SECONDS = 1.0  # that joules are counted for

Gradient = dict[str, Tensor]
Step = Callable[[Tensor, Tensor], Any]


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


@dataclass(frozen=True)
class Contender:
    """One way, ready to run. `meta_gradient` takes one step from the state of the start and gives what φ got."""

    step: Step
    meta_gradient: Callable[[Tensor, Tensor], Gradient]
    close: Callable[[], None] = lambda: None  # gives back what it holds


def contender(
    way: Way, case: Case, state: State, device: torch.device, in_float64: bool, checkout: Path | None
) -> Contender:
    """Made anew, at `state`, without momentum."""
    dtype = torch.float64 if in_float64 else torch.float32
    if way.by == "engine":
        return _engine(way, case, state, device, dtype)
    if way.by == "reference":
        return _reference(way, case, state, device, dtype)
    theirs = official.Official(checkout, case, state, device, dtype)
    return Contender(theirs.step, theirs.meta_gradient, theirs.close)


def double(way: Way, judge: "Judge", checkout: Path | None = None) -> Contender | None:
    """The same way in float64; not of low precisions, nor where it takes another compilation."""
    if way.precision != "fp32" or way.mode == "compile":
        return None
    return contender(way, judge.case, judge.state, judge.device, True, checkout)


def _engine(way: Way, case: Case, state: State, device: torch.device, dtype: torch.dtype) -> Contender:
    learner = case.learner(device, dtype, state)
    options: dict[str, Any] = {"mode": way.mode, "precision": way.precision, "memory": way.memory}
    engine = Engine(learner, inner_steps=case.inner_steps, meta_weight_decay=0.0, **options)
    start = copy.deepcopy(engine.state_dict())
    names = [f"{part}.{name}" for part in ("what", "where") for name, _ in getattr(learner, part).named_parameters()]

    warm_up = CUDA_WARM_UP if device.type == "cuda" and way.mode != "eager" else 0

    def meta_gradient(x: Tensor, y: Tensor) -> Gradient:
        nonlocal warm_up
        for _ in range(warm_up):  # so that what is checked is what is timed, a replay
            engine.step(x, y)
        warm_up = 0
        engine.load_state_dict(start)
        engine.step(x, y)
        moments = engine.state_dict()["adam"]["state"]  # after one step from zero: exp_avg = (1 - 0.9) gradient
        return {name: moments[i]["exp_avg"] / 0.1 for i, name in enumerate(names)}

    return Contender(engine.step, meta_gradient)


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


@contextmanager
def pytorch_precision(precision: str, device: torch.device) -> Iterator[None]:
    """How plain PyTorch computes in a precision: bf16 by autocast."""
    floors.set_precision(precision)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        floors.set_precision("fp32")


# Correctness


def relative_error(gradient: Gradient, exact: Gradient) -> float:
    """‖g − exact‖ / ‖exact‖ over all of φ."""
    if gradient.keys() != exact.keys():
        raise ValueError(f"parameters differ: {sorted(gradient.keys() ^ exact.keys())}")
    difference = sum((gradient[name].double() - g.double()).square().sum() for name, g in exact.items())
    norm = sum(g.double().square().sum() for g in exact.values())
    return math.sqrt(float(difference) / float(norm))


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
        return statistics.median(relative_error(g, e) for g, e in zip(gradients, self._exact, strict=False))

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


# Rows


def iteration_rows(
    case: Case,
    ways: Sequence[Way],
    rates: dict[str, float],
    rounds: int,
    device: torch.device,
    judge: Judge,
    checkout: Path | None = None,
) -> Iterator[Row]:
    """A row for each way, with its speedup over what came before it of the reference and the official code.

    On a CPU all take turns. On a GPU one comes after the other, as their memory would not fit together.
    """
    telemetry = Telemetry(device)
    x, y = case.images(0, device, torch.float32)
    baselines: dict[str, list[float]] = {}  # times of those that are correct
    for group in [ways] if device.type == "cpu" else [[way] for way in ways]:
        ready: list[Contender] = []
        calls: dict[Way, Callable[[], Any]] = {}
        rows: dict[Way, Row] = {}
        for way in group:
            row: Row = {"kind": "iteration", "case": case.name, "batch": case.batch, "inner_steps": case.inner_steps}
            row |= asdict(way)
            before = _reserved(device)
            try:
                one = contender(way, case, judge.state, device, False, checkout)
                ready.append(one)
                exact = double(way, judge, checkout)
                row |= judge.verdict(way, one, exact)
                if exact is not None:
                    exact.close()
                call = functools.partial(one.step, x, y)
                rows[way] = row | _memory(way, call, before, device)
                calls[way] = call
            except Exception as error:  # one contender's failure is its row
                yield unavailable(row, error)
        by_name = {str(way): call for way, call in calls.items()}
        times = timing.milliseconds(by_name, rounds, device, cold=False, repeat=REPEAT)
        for way, row in rows.items():
            mine = times[str(way)]
            if way.by != "engine" and way.precision == "fp32" and row["correct"]:
                baselines[way.by] = mine
        for way, row in rows.items():
            mine = times[str(way)]
            row |= timing.summary(mine) | {"images_per_second": 1e3 * case.batch / statistics.median(mine)}
            row |= floors.floor(floors.Floors(case, way.precision).iteration, rates, way.precision, row["ms_median"])
            for by, theirs in baselines.items():
                if row["correct"] and way != Way(by):
                    found = timing.speedup(theirs, mine).items()
                    row |= {f"{field}_over_{by}": value for field, value in found}
            row |= _energy(calls[way], row["ms_median"], case.batch, telemetry, device)
            yield row
        for one in ready:
            one.close()
        del ready, calls, by_name
        one = call = exact = None  # its memory is the next one's


def _reserved(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU when it holds nothing that it could give back."""
    if device.type == "cpu":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_reserved(device)


def _memory(way: Way, call: Callable[[], Any], before: int, device: torch.device) -> Row:
    """Most bytes that an iteration holds; on a CPU counted, with the FLOPs. Also the warm-up.

    The official code runs in a thread of its own, into which the counters do not see: of it nothing is counted.
    """
    if device.type == "cpu":
        if way.by == "official":
            call()
            return {}
        return asdict(count(call))
    _reserved(device)  # what the check held is no iteration's
    for _ in range(CUDA_WARM_UP):
        call()
    torch.cuda.synchronize(device)
    return {"peak_bytes": torch.cuda.max_memory_reserved(device) - before}


def _energy(call: Callable[[], Any], ms: float, images: int, telemetry: Telemetry, device: torch.device) -> Row:
    """Telemetry of this contender alone, for about a second."""
    iterations = 1 if telemetry.absent else max(3, math.ceil(1e3 * ENERGY_SECONDS / ms))
    with telemetry.watch(iterations, iterations * images) as row:
        if not telemetry.absent:
            for _ in range(iterations):
                call()
            torch.cuda.synchronize(device)
    return row


def meta_gradient_rows(
    case: Case, rates: dict[str, float], rounds: int, device: torch.device, judge: Judge
) -> Iterator[Row]:
    """The meta-gradient alone: the engine, the reference, and other libraries that can compute it."""
    ready: dict[str, Callable[[Tensor, Tensor], Gradient]] = {}
    rows: dict[str, Row] = {}
    makers: dict[str, Callable[[Case, torch.dtype], Callable[[Tensor, Tensor], Gradient]]] = {
        "reference": lambda case, dtype: case.reference(device, dtype, judge.state).meta_gradient,
        "engine": lambda case, dtype: (
            Engine(case.learner(device, dtype, judge.state), inner_steps=case.inner_steps).meta_gradient
        ),
        "higher": lambda case, dtype: others.higher_meta_gradient(case.reference(device, dtype, judge.state)),
        "torchopt": lambda case, dtype: others.torchopt_meta_gradient(case.reference(device, dtype, judge.state)),
    }
    batch = judge.images(0, torch.float64)
    exact: Gradient = {}
    for name, make in makers.items():
        row = {"kind": "meta-gradient", "case": case.name, "batch": case.batch, "inner_steps": case.inner_steps}
        row |= {"by": name, "precision": "fp32"}
        try:
            gradient = make(judge.case, torch.float64)(*batch)
            exact = exact or gradient
            error = relative_error(gradient, exact)
            rows[name] = {**row, "error_float64": error, "correct": error <= EXACT}
            ready[name] = make(case, torch.float32)
        except Exception as error:  # not installed, not able: a row says so
            yield unavailable(row, error)
    x, y = case.images(0, device, torch.float32)
    calls = {name: functools.partial(call, x, y) for name, call in ready.items()}
    for call in calls.values():
        call()
    times = timing.milliseconds(calls, rounds, device, cold=False)
    least = floors.Floors(case, "fp32")
    for name, row in rows.items():
        row |= timing.summary(times[name])
        row |= floors.floor(least.source + least.meta_gradient, rates, "fp32", row["ms_median"])
        if row["correct"] and name != "reference":
            found = timing.speedup(times["reference"], times[name]).items()
            row |= {f"{field}_over_reference": value for field, value in found}
        yield row


# The command


def ways_of(device: torch.device, checkout: Path | None, modes: Sequence[Mode]) -> list[Way]:
    """All ways that the device may have, the most telling first; on a CPU neither low precisions nor graphs."""
    official_too = [Way("official")] if checkout else []
    if device.type == "cpu":
        return [REFERENCE, *official_too, Way(), Way(memory="recompute")]
    precisions: tuple[Precision, ...] = ("bf16", "tf32", "fp32")
    ways = [REFERENCE, *official_too, *(Way(mode=mode, precision=p) for mode in modes for p in precisions)]
    if "eager" in modes:
        ways += [Way(memory="recompute"), Way("reference", precision="tf32"), Way("reference", precision="bf16")]
    return ways


def show(row: Row) -> None:
    """One line of the table."""
    title = f"{row['case']} B={row['batch']} T={row['inner_steps']} {name_of(row)}"
    if "unavailable" in row:
        return say(f"{title}: {row['unavailable']}")
    speedup = row.get("speedup_over_reference")
    cells = [f"{row['ms_median']:.1f} ms", f"{row['floor_fraction']:.0%}", f"{speedup:.2f}x" if speedup else "-"]
    return say(title, [*cells, *([] if row["correct"] else ["inexact"])])


def main() -> None:
    parser = results.parser(__doc__)
    cases.add_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the engine, on a GPU")
    parser.add_argument(
        "--others", action="store_true", help="also the meta-gradient alone, by higher and TorchOpt too"
    )
    parser.add_argument("--sweep", nargs="+", type=int, metavar="T", help="also over these T, and over batch sizes")
    parser.add_argument("--official", type=Path, help="a checkout of alinlab/L2T-ww, to be timed beside")
    arguments = parser.parse_args()
    device = results.device(arguments)
    results.start("iterations", arguments, device)
    torch.backends.cudnn.benchmark = True  # as the official code has it; for all alike
    rates = floors.rates(("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32",), device)
    results.append(arguments.output, {"kind": "rates", "rates": rates})
    for case in cases.selected(arguments):
        judge = Judge(case, device)
        ways = ways_of(device, arguments.official, arguments.modes)
        rows = iteration_rows(case, ways, rates, arguments.rounds, device, judge, arguments.official)
        results.write(arguments.output, rows, show)
        if arguments.others:
            results.write(arguments.output, meta_gradient_rows(case, rates, arguments.rounds, device, judge), show)
        if arguments.sweep:
            results.write(arguments.output, sweep_rows(case, arguments.sweep, rates, device, judge), show)


def sweep_rows(
    case: Case, steps: Sequence[int], rates: dict[str, float], device: torch.device, judge: Judge
) -> Iterator[Row]:
    """The same over T, those of `steps` but the case's own, and over the number of images."""
    mode: Mode = "graph" if device.type == "cuda" else "eager"
    ways = [REFERENCE, Way(mode=mode), Way(mode=mode, memory="recompute")]
    for T in steps:
        if case.inner_steps != T:
            other = replace(case, inner_steps=T)
            yield from iteration_rows(other, ways, rates, SWEEP_ROUNDS, device, Judge(other, device, batches=1))
    for share in SWEEP_BATCH:
        other = replace(case, batch=int(share * case.batch))
        # On a GPU a captured graph is checked with the images that it was captured for.
        of_batch = judge if device.type == "cpu" else Judge(other, device, batches=1)
        yield from iteration_rows(other, ways, rates, SWEEP_ROUNDS, device, of_batch)


if __name__ == "__main__":
    main()
