"""Does the engine train as the authors' code does? Losses of each iteration, and accuracies, on the same batches.

Both sides get the same source, starting weights, batches and learning rates; g starts alike in both, its bias at one.
Losses are equal up to rounding until the chaos of a fresh target (CONTRIBUTING.md) has amplified it, which `--double`
puts off. What else differs is switched by `--variants`, one at a time:

- plain: the authors' BatchNorm, our schedule, augmented images, the smaller last batch of an epoch kept;
- statistics: BatchNorm's running statistics come from real steps alone, as the engine has them. In the authors' code
  the batch passes a second time, through θ', when the first simulated step is differentiated, and what that pass leaves
  in the statistics is not rolled back. The plain engine is given that pass here, and nowhere else;
- schedule: cosine annealing steps before the first epoch, as the authors' loop under a PyTorch since 1.1, so that the
  last epoch has a learning rate of zero;
- augmentation: none;
- last-batch: a smaller last batch is dropped.
"""

import argparse
import copy
import dataclasses
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from benchmarks.cases import MODULES, Case, State
from benchmarks.contenders.judge import relative_error
from benchmarks.contenders.official import Official
from benchmarks.measure.rates import set_precision
from benchmarks.rows import Row, add_row_arguments, begin, say, unavailable, write
from l2t_fast import L2T, Engine
from l2t_fast.data.images import ImageSet, LabelledBatch
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data, load_data
from l2t_fast.errors import L2TError
from l2t_fast.learner.undisturbed import modes_kept
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.networks.weights import checkpoint_classes, load_weights
from l2t_fast.training.fit import Schedule

VARIANTS = ("plain", "statistics", "schedule", "augmentation", "last-batch")
LOSSES = ("loss", "matching_loss", "meta_loss")
CLOSE = 1e-3  # relative difference of a loss from which two curves count as apart
_EVAL_BATCH = 250


class Side(Protocol):
    """One of the two that train."""

    network: nn.Module

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One iteration; LOSSES of it, on the device."""

    def set_lr(self, lr: float) -> None:
        """Of the steps that follow."""


class EngineSide:
    """The engine; with `second_pass` BatchNorm's running statistics are those of the authors' code."""

    def __init__(self, engine: Engine, second_pass: bool) -> None:
        self.network, self._engine, self._second_pass = engine.learner.target, engine, second_pass

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        metrics = self._engine.step(x, y)
        if self._second_pass:
            with torch.no_grad():
                self.network(x)
        return {name: metrics[name].clone() for name in LOSSES}

    def set_lr(self, lr: float) -> None:
        self._engine.lr = lr


class OfficialSide:
    """The authors' code; with `real_alone` the running statistics are those of the engine."""

    def __init__(self, official: Official, real_alone: bool) -> None:
        self.network, self._official = official.network, official
        self.set_lr = official.set_lr
        self._found = official.record()
        if real_alone:
            official.keep_statistics_of_real_steps()

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self._found.clear()
        self._official.step(x, y)
        losses = [value for name, value in self._found if name == "loss"]
        matching = next(value for name, value in self._found if name == "matching_loss")
        # Cross entropies of an iteration: real step, simulated step on L_org, L_meta; then the sweep takes steps again.
        return {"loss": losses[0], "matching_loss": matching, "meta_loss": losses[2]}


class Training(NamedTuple):
    """What both sides share."""

    source: nn.Module
    data: Data
    state: State
    case: Case
    schedule: Schedule


class Curves(NamedTuple):
    """Of one training: LOSSES of each iteration; at its end running statistics by name, and accuracies."""

    losses: dict[str, list[float]]
    statistics: dict[str, Tensor]
    test: float
    val: float | None
    seconds: float


def prepare(arguments: argparse.Namespace, seed: int, device: torch.device, dtype: torch.dtype) -> Training:
    """Images, the source, and the weights that both sides start from."""
    config = DataConfig(arguments.dataset, data_root=arguments.data_root, per_class=arguments.per_class)
    data = load_data(config, seed)
    some = torch.linspace(0, len(data.test) - 1, min(arguments.test_images or len(data.test), len(data.test))).long()
    data = dataclasses.replace(data, test=data.test.select(some, data.test.labels[some], augment=False))
    data = dataclasses.replace(data, **{part: getattr(data, part).to(device) for part in ("train", "val", "test")})
    classes = checkpoint_classes(arguments.source_weights, "resnet32")
    source = build_model("resnet32", classes)
    load_weights(source, arguments.source_weights)
    torch.manual_seed(seed)
    case = Case("parity", "resnet32", "vgg9_bn", classes, data.num_classes, size=32, batch=arguments.batch)
    learner = _learner(source.to(device, dtype), case, device, dtype)
    state = {name: copy.deepcopy(getattr(learner, name).state_dict()) for name in MODULES}
    return Training(source, data, state, case, Schedule(arguments.epochs, arguments.batch, arguments.lr, seed))


def _learner(source: nn.Module, case: Case, device: torch.device, dtype: torch.dtype) -> L2T:
    target = build_model(case.target, case.classes).to(device, dtype)
    layers = {
        "source_layers": default_layers(case.source, source),
        "target_layers": default_layers(case.target, target),
    }
    return L2T(source, target, example=torch.zeros(2, 3, case.size, case.size, device=device, dtype=dtype), **layers)


def side(
    name: str, variant: str, made: Training, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> Side:
    """A side at the start of a training."""
    alone = variant == "statistics"
    if name == "official":
        options = {"beta": arguments.beta, "meta-lr": arguments.meta_lr}
        theirs = Official(arguments.official, made.case, made.state, device, dtype, made.source, options)
        return OfficialSide(theirs, real_alone=alone)
    learner = _learner(made.source, made.case, device, dtype)
    for part, state in made.state.items():
        getattr(learner, part).load_state_dict(state)
    options = {"mode": arguments.mode, "precision": "fp32" if arguments.double else arguments.precision}
    engine = Engine(learner, lr=arguments.lr, meta_lr=arguments.meta_lr, beta=arguments.beta, say=_quiet, **options)
    return EngineSide(engine, second_pass=not alone)


def _quiet(text: str) -> None:
    pass


def train(one: Side, variant: str, data: Data, schedule: Schedule, dtype: torch.dtype, most: int | None) -> Curves:
    """One training, or its first `most` iterations."""
    found: list[dict[str, Tensor]] = []
    start = perf_counter()
    for epoch in range(schedule.epochs):
        one.set_lr(schedule.lr_at(epoch + (variant == "schedule")))
        for x, y in _batches(data.train, variant, schedule, epoch):
            if most is None or len(found) < most:
                found.append(one.step(x.to(dtype), y))
    losses = {name: torch.stack([losses[name] for losses in found]).tolist() for name in LOSSES}  # waits for the device
    seconds = perf_counter() - start
    running = {name: buffer.clone() for name, buffer in one.network.named_buffers() if "running" in name}
    val = accuracy(one.network, data.val, dtype) if len(data.val) else None
    return Curves(losses, running, accuracy(one.network, data.test, dtype), val, seconds)


def _batches(images: ImageSet, variant: str, schedule: Schedule, epoch: int) -> Iterator[LabelledBatch]:
    if variant == "augmentation":
        images = dataclasses.replace(images, augment=False)
    for x, y in images.batches(schedule.batch_size, seed=schedule.seed, epoch=epoch):
        if variant != "last-batch" or len(y) == schedule.batch_size:
            yield x, y


@torch.no_grad()
def accuracy(network: nn.Module, images: ImageSet, dtype: torch.dtype) -> float:
    """A fraction; the network may return its features as well."""
    correct = 0
    with modes_kept(network):
        network.eval()
        for x, y in images.eval_batches(_EVAL_BATCH):
            out = network(x.to(dtype))
            correct += int(((out[0] if isinstance(out, tuple) else out).argmax(1) == y).sum())
    return correct / len(images)


def apart(ours: Curves, theirs: Curves) -> Row:
    """Of each loss the relative differences, and the first iteration with more than CLOSE; of the running statistics
    at the end one for all."""
    row: Row = {}
    for name in LOSSES:
        differences = [abs(a - b) / abs(b) for a, b in zip(ours.losses[name], theirs.losses[name], strict=True)]
        first = next((i for i, d in enumerate(differences) if not d <= CLOSE), len(differences))
        row[name] = {"alike_for": first, "differences": [float(f"{d:.2e}") for d in differences]}
    names = list(ours.statistics)  # theirs has layers that it never uses
    return row | {
        "statistics": relative_error([ours.statistics[n] for n in names], [theirs.statistics[n] for n in names])
    }


def parity_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A row for each training, and one that compares the sides of each variant and seed."""
    dtype = torch.float64 if arguments.double else torch.float32
    precision = "fp64" if arguments.double else arguments.precision
    images = {"dataset": arguments.dataset, "per_class": arguments.per_class, "batch": arguments.batch}
    settings = {"epochs": arguments.epochs, "lr": arguments.lr, "beta": arguments.beta, "meta_lr": arguments.meta_lr}
    for seed in arguments.seeds:
        made = prepare(arguments, seed, device, dtype)
        for variant in arguments.variants:
            found: dict[str, Curves] = {}
            told = {"variant": variant, "seed": seed, "precision": precision, **images, **settings}
            for name in arguments.sides:
                row: Row = {"kind": "parity", "by": name, **told}
                try:
                    set_precision("tf32" if precision == "tf32" else "fp32")
                    one = side(name, variant, made, arguments, device, dtype)
                    curves = train(one, variant, made.data, made.schedule, dtype, arguments.iterations)
                except L2TError as error:
                    yield unavailable(row, error)
                    continue
                finally:
                    set_precision("fp32")
                found[name] = curves
                ends = {"test_accuracy": curves.test, "val_accuracy": curves.val, "seconds": curves.seconds}
                yield row | ends | {"iterations": len(curves.losses["loss"]), "losses": curves.losses}
            if len(found) == 2:
                yield {"kind": "curves", **told, **apart(found["engine"], found["official"])}


def summary(rows: list[Row]) -> list[str]:
    """Of each variant and side the mean test accuracy and its spread over the seeds."""
    lines = []
    for key in dict.fromkeys((row["variant"], row["by"]) for row in rows if "test_accuracy" in row):
        found = [100 * row["test_accuracy"] for row in rows if (row.get("variant"), row.get("by")) == key]
        spread = statistics.stdev(found) if len(found) > 1 else math.nan
        lines.append(f"{key[0]}, {key[1]}: {statistics.mean(found):.2f} ± {spread:.2f} % of the test images")
    return lines


def show(row: Row) -> None:
    """One line of the table."""
    title = f"{row['variant']}, seed {row['seed']}: {row.get('by', 'losses alike for')}"
    if "unavailable" in row:
        return say(f"{title}: {row['unavailable']}")
    if row["kind"] == "curves":
        return say(
            title, [*(f" {name} {row[name]['alike_for']}" for name in LOSSES), f" statistics {row['statistics']:.1e}"]
        )
    say(title, [f"test {row['test_accuracy']:.1%}", f"{row['iterations']} it", f"{row['seconds']:.1f} s"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--official", type=Path, help="a checkout of alinlab/L2T-ww")
    parser.add_argument("--dataset", default="fashion-mnist", help="of 32 x 32 (default fashion-mnist)")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--source-weights", type=Path, required=True, help="a checkpoint of a ResNet32")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--iterations", type=int, help="stop after so many")
    parser.add_argument("--test-images", type=int, help="so many of them, evenly spaced (default: all)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--meta-lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:2]))
    parser.add_argument("--sides", nargs="+", choices=("engine", "official"), default=["engine", "official"])
    parser.add_argument("--mode", default="auto", help="of the engine")
    parser.add_argument("--precision", choices=("fp32", "tf32"), default="fp32", help="of both")
    parser.add_argument("--double", action="store_true", help="in float64")


def run(arguments: argparse.Namespace) -> None:
    """Each variant with each seed, both sides in turn."""
    device = begin("official-accuracy", arguments)
    done: list[Row] = []

    def rows() -> Iterator[Row]:
        for row in parity_rows(arguments, device):
            done.append(row)
            yield row

    write(arguments.output, rows(), show)
    for line in summary(done):
        say(line)
