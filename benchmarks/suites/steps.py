"""Times the steps of an iteration, each beside the plain way to the same.

    matching step, task step    ∇θ L_wfm and ∇θ L_org, and both with their adjoint (a derivative of <∇, u> to θ)
    source pre-pass             source features, w and λ: once an iteration
    input pipeline              a batch of small images, cropped at random, mirrored and normalised

`plain` is autograd on the reference's losses, and for the input torchvision's transforms, image by image, as in the
official code; `engine` is l2t_fast; `compiled` is torch.compile of what the engine runs. What they give is first
compared with float64.
"""

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from benchmarks.cases import Case, State, add_case_arguments, chosen_cases
from benchmarks.contenders.judge import CHECK_BATCH, relative_error
from benchmarks.measure import floors, timing
from benchmarks.measure.rates import device_rates, rates_row
from benchmarks.measure.telemetry import Telemetry
from benchmarks.rows import Row, add_row_arguments, append, begin, say, unavailable, write
from l2t_fast.data.images import MEAN, PAD, STD, TensorSet
from l2t_fast.engine import inner_step as inner
from l2t_fast.reference import forward_with_features

TOLERANCE = 1e-4  # relative, of float32 against float64
IMAGES = 2048  # of the data set that the input pipeline draws from

SMALL = 64  # pixels: larger images are read from files, and no data set of them is at hand

Output = Sequence[Tensor]
Call = Callable[[], Output]
Make = Callable[[], Call]


# Inner steps


def plain_step(case: Case, dtype: torch.dtype, *, kind: str, adjoint: bool, state: State, device: torch.device) -> Call:
    """By autograd, on the modules themselves."""
    reference = case.reference(device, dtype, state)
    x, y = case.images(0, device, dtype)
    theta = [reference.theta[name] for name in sorted(reference.theta)]
    u = _direction(theta)

    def loss() -> Tensor:
        if kind == "matching step":
            return reference.matching_loss(x, reference.beta)
        return F.cross_entropy(reference.target(x), y)

    def call() -> Output:
        grads = torch.autograd.grad(loss(), theta, create_graph=adjoint, allow_unused=True)
        return _adjoint(grads, theta, u) if adjoint else _dense(grads, theta)

    return call


def engine_step(
    case: Case,
    dtype: torch.dtype,
    *,
    kind: str,
    adjoint: bool,
    state: State,
    device: torch.device,
    compiled: bool = False,
) -> Call:
    """By `inner.gradient`, source features and weights given."""
    learner = case.learner(device, dtype, state)
    x, y = case.images(0, device, dtype)
    with torch.no_grad():
        S = learner.source_features(x)
        a, _ = learner.coefficients(S, 0.5)
        batch = inner.StepInput(x, y, *learner.matching_sources(S, learner.resizes(x)), a)
    start = {name: p.detach().requires_grad_(adjoint) for name, p in inner.parameters(learner).items()}
    names = sorted(start)
    theta = [start[name] for name in names]
    u = _direction(theta)
    which = {"task": kind == "task step", "matching": kind == "matching step"}

    def gradient(theta: dict[str, Tensor]) -> dict[str, Tensor]:
        return inner.gradient(learner, theta, batch, **which).theta

    if compiled:
        torch.compiler.reset()
        gradient = torch.compile(gradient, fullgraph=True, dynamic=False)

    def call() -> Output:
        with torch.set_grad_enabled(adjoint):
            found = gradient(start)
        grads = [found.get(name) for name in names]  # none where the step's loss does not reach
        return _adjoint(grads, theta, u) if adjoint else _dense(grads, theta)

    return call


def _direction(theta: Sequence[Tensor]) -> list[Tensor]:
    """u, one for each parameter, the same numbers in every precision."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in theta]


def _dense(grads: Sequence[Tensor | None], theta: Sequence[Tensor]) -> Output:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, theta, strict=True)]


def _adjoint(grads: Sequence[Tensor | None], theta: Sequence[Tensor], u: Sequence[Tensor]) -> Output:
    """The derivative of <∇, u> to θ."""
    used = [(g, u_p) for g, u_p in zip(grads, u, strict=True) if g is not None and g.requires_grad]
    outputs, directions = zip(*used, strict=True)
    return _dense(torch.autograd.grad(outputs, list(theta), directions, allow_unused=True), theta)


# Source and input


def plain_source(case: Case, dtype: torch.dtype, *, state: State, device: torch.device) -> Call:
    """The features of every source layer, by forward hooks; w and λ pair by pair."""
    reference = case.reference(device, dtype, state)
    x, _ = case.images(0, device, dtype)

    @torch.no_grad()
    def call() -> Output:
        taps = zip(reference.sources, reference.source_layers, strict=True)
        S = [forward_with_features(source, layers, x)[1] for source, layers in taps]
        pooled = [S[s][m].mean((2, 3)) for s, m, _ in reference.pairs]
        w = [F.softmax(f(feature), 1) for f, feature in zip(reference.what, pooled, strict=True)]
        lam = [F.relu6(g(feature))[:, 0] for g, feature in zip(reference.where, pooled, strict=True)]
        return [*itertools.chain(*S), *w, *lam]

    return call


def engine_source(case: Case, dtype: torch.dtype, *, state: State, device: torch.device) -> Call:
    learner = case.learner(device, dtype, state)
    x, _ = case.images(0, device, dtype)

    @torch.no_grad()
    def call() -> Output:
        S = learner.source_features(x)
        w, lam = learner.weights(S)
        return [*S, *w, *lam]

    return call


def _image_set(case: Case, device: torch.device, augment: bool) -> TensorSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, case.size, case.size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(case.classes, (IMAGES,), generator=generator)
    return TensorSet(labels=labels, augment=augment, images=images, flip=True).to(device)  # type: ignore[return-value]


def engine_input(case: Case, device: torch.device, augment: bool) -> Call:
    """The next batch."""
    images = _image_set(case, device, augment)

    def forever() -> Iterator[Tensor]:
        while True:
            epoch = images.batches(case.batch, seed=0, epoch=0) if augment else images.eval_batches(case.batch)
            yield from (x for x, _ in epoch if len(x) == case.batch)

    batches = forever()
    return lambda: [next(batches)]


def plain_input(case: Case, device: torch.device, augment: bool, dtype: torch.dtype) -> Call:
    """The same, image by image from PIL."""
    images = _image_set(case, torch.device("cpu"), augment).images
    pictures = [transforms.functional.to_pil_image(image) for image in images[: case.batch]]
    shape = [transforms.RandomCrop(case.size, padding=PAD), transforms.RandomHorizontalFlip()] if augment else []
    normalise = transforms.Normalize(MEAN, STD)
    transform = transforms.Compose([*shape, transforms.PILToTensor(), lambda t: t.to(dtype) / 255, normalise])
    return lambda: [torch.stack([transform(picture) for picture in pictures]).to(device)]


# Rows


@dataclass(frozen=True)
class Step:
    """What is timed, and the same on a small batch, which is compared with float64."""

    kind: str
    name: str
    floor: floors.Work
    timed: dict[str, Make]
    checked: dict[str, Make]
    exact: Make


def steps(case: Case, device: torch.device, state: State) -> list[Step]:
    """All steps of an iteration of `case`, which is in `state`."""
    small = replace(case, batch=min(case.batch, CHECK_BATCH[device.type]))
    floor = floors.Floors(case, "fp32")
    found = []

    def add(kind: str, name: str, work: floors.Work, ways: dict[str, Callable[[Case, torch.dtype], Call]]) -> None:
        timed = {by: partial(make, case, torch.float32) for by, make in ways.items()}
        checked = {by: partial(make, small, torch.float32) for by, make in ways.items()}
        found.append(Step(kind, name, work, timed, checked, partial(ways["plain"], small, torch.float64)))

    for kind, work, adjoint_work in (
        ("matching step", floor.matching_step, floor.matching_adjoint),
        ("task step", floor.task_step, floor.task_adjoint),
    ):
        for adjoint in (False, True):
            here = {"kind": kind, "adjoint": adjoint, "state": state, "device": device}
            ways = {
                "plain": partial(plain_step, **here),
                "engine": partial(engine_step, **here),
                "compiled": partial(engine_step, **here, compiled=True),
            }
            name, least = (f"{kind}, adjoint", work + adjoint_work) if adjoint else (kind, work)
            add("inner step", name, least, ways)
    place = {"state": state, "device": device}
    ways = {"plain": partial(plain_source, **place), "engine": partial(engine_source, **place)}
    add("source", "source pre-pass", floor.source, ways)
    if case.size <= SMALL:
        plain, engine = partial(plain_input, case, device), partial(engine_input, case, device)
        found.append(
            Step(
                "input",
                "input pipeline",
                floor.input,
                timed={"plain": partial(plain, True, torch.float32), "engine": partial(engine, True)},
                # What is drawn at random differs: compared without.
                checked={"plain": partial(plain, False, torch.float32), "engine": partial(engine, False)},
                exact=partial(plain, False, torch.float64),
            )
        )
    return found


def step_rows(
    step: Step, case: Case, rates: dict[str, float], rounds: int, device: torch.device, missing: dict[str, str]
) -> Iterator[Row]:
    """A row for each way to a step; `missing` says why some are not to be had."""
    exact = step.exact()()
    calls: dict[str, Call] = {}
    rows: dict[str, Row] = {}
    for by, make in step.timed.items():
        row: Row = {"kind": step.kind, "part": step.name, "case": case.name, "batch": case.batch, "by": by}
        row["precision"] = "fp32"
        if by in missing:
            yield unavailable(row, missing[by])
            continue
        try:
            error = relative_error(step.checked[by]()(), exact)
            calls[by] = make()
            calls[by]()
            rows[by] = {**row, "error": error, "correct": error <= TOLERANCE}
        except Exception as error:  # one way's failure is its row
            yield unavailable(row, error)
    with Telemetry(device).watch() as telemetry:
        times = timing.milliseconds(calls, rounds, device, cold=False)
    for by, row in rows.items():
        row |= timing.summary(times[by])
        row |= floors.floor(step.floor, rates, "fp32", row["ms_median"]) | telemetry
        if by != "plain" and row["correct"] and rows["plain"]["correct"]:
            found = timing.speedup(times["plain"], times[by]).items()
            row |= {f"{field}_over_plain": value for field, value in found}
        yield row


def show(row: Row) -> None:
    """One line of the table."""
    title = f"{row['case']} B={row['batch']} {row['part']}, {row['by']}"
    if "unavailable" in row:
        return say(f"{title}: {row['unavailable']}")
    speedup = row.get("speedup_over_plain")
    cells = [f"{row['ms_median']:.2f} ms", f"{row['floor_fraction']:.0%}", f"{speedup:.2f}x" if speedup else "-"]
    return say(title, [*cells, *([] if row["correct"] else ["inexact"])])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    add_case_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """All steps of each case."""
    device = begin("steps", arguments)
    rates = device_rates(("fp32",), device)
    append(arguments.output, rates_row(rates))
    slow = "compiled on a GPU only: Inductor takes minutes on a CPU, and gains nothing there"
    missing = {} if device.type == "cuda" else {"compiled": slow}
    for case in chosen_cases(arguments):
        for step in steps(case, device, case.warm_state(device)):
            write(arguments.output, step_rows(step, case, rates, arguments.rounds, device, missing), show)
            gc.collect()
