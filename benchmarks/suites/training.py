"""Whole trainings, data, validation and checkpoints included.

Of each method the images a second of a short run on digits, and with `--data-root` the seconds until the validation
accuracy on Fashion-MNIST first reaches `--accuracy`. Without `--source-weights` the source network is random there,
and rows say so: seconds an epoch do not depend on it, the number of epochs does.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import CASES, Case
from benchmarks.measure import floors
from benchmarks.measure.rates import device_rates, rates_row
from benchmarks.measure.telemetry import Telemetry
from benchmarks.rows import Row, add_row_arguments, append, begin, say, unavailable, write
from l2t_fast import L2T, Engine
from l2t_fast.choices import Mode
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data, load_data
from l2t_fast.errors import Interrupted
from l2t_fast.methods import METHODS, find_method
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.networks.weights import checkpoint_classes, load_weights
from l2t_fast.training.fit import Schedule, fit


class Counter:
    """Watches a training that begins anew, and counts its iterations."""

    def __init__(self) -> None:
        self.iterations = 0

    def resumed(self, epoch: int, iteration: int) -> None:
        raise AssertionError("a benchmark begins anew")

    def iteration(self, epoch: int, metrics: dict[str, Tensor]) -> None:
        self.iterations += 1

    def evaluating(self, part: str) -> None:
        pass

    def epoch(self, row: dict[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        raise AssertionError(f"a benchmark has nothing to be told of: {text}")

    def stop_asked(self) -> bool:
        return False


class _Stopwatch(Counter):
    """Stops a training where validation reaches `accuracy`."""

    def __init__(self, accuracy: float) -> None:
        super().__init__()
        self._accuracy, self._start = accuracy, perf_counter()
        self.seconds: float | None = None  # until then
        self.best = 0.0

    def epoch(self, row: dict[str, Any]) -> None:
        self.best = max(self.best, row.get("val_accuracy", 0.0))
        if self.best >= self._accuracy and self.seconds is None:
            self.seconds = perf_counter() - self._start

    def stop_asked(self) -> bool:
        return self.seconds is not None


def loaded(config: DataConfig, device: torch.device) -> Data:
    """The images of seed 0, on the device."""
    data = load_data(config, 0)
    return replace(data, **{part: getattr(data, part).to(device) for part in ("train", "val", "test")})


def learner(method: str, case: Case, data: Data, weights: Path | None, device: torch.device) -> tuple[nn.Module, L2T]:
    """(target, learner) of a method on `data`, with the networks of `case`."""
    torch.manual_seed(0)
    target = build_model(case.target, data.num_classes, case.target_width).to(device)
    example = torch.zeros(2, *data.image_shape, device=device)
    chosen = find_method(method)
    sources: list[nn.Module] = []
    if chosen.uses_sources:
        classes = case.source_classes if weights is None else checkpoint_classes(weights, case.source)
        sources = [build_model(case.source, classes).to(device)]
        if weights is not None:
            load_weights(sources[0], weights)
    if chosen.start is not None:
        chosen.start(target, sources)
    return target, chosen.learner(
        sources,
        target,
        source_layers=[default_layers(case.source, source) for source in sources],
        target_layers=default_layers(case.target, target),
        example=example,
    )


def train(
    method: str,
    case: Case,
    config: DataConfig,
    epochs: int,
    device: torch.device,
    rates: dict[str, float],
    mode: Mode = "auto",
    weights: Path | None = None,
    accuracy: float = 2.0,
) -> Row:
    """Runs one training; with `accuracy` at most 1, until validation reaches it."""
    data = loaded(config, device)
    target, made = learner(method, case, data, weights, device)
    engine = Engine(made, lr=0.03, meta_lr=1e-3, inner_steps=case.inner_steps, mode=mode)
    row: Row = {"case": case.name, "batch": case.batch, "by": method, "mode": mode, "precision": "fp32"}
    row |= {"dataset": config.dataset, "source": "trained" if weights else "random", "epochs": epochs}
    watch = _Stopwatch(accuracy)
    images, iterations = epochs * len(data.train), epochs * data.train.num_batches(case.batch)
    with tempfile.TemporaryDirectory() as folder, Telemetry(device).watch(iterations, images) as seen:
        start = perf_counter()
        with contextlib.suppress(Interrupted):  # there
            fit(Path(folder), engine, target, data, Schedule(epochs, case.batch, 0.03, seed=0), watch)
        seconds = perf_counter() - start
    floor = floors.Floors(case, "fp32", [(pair.m, pair.n) for pair in made.pairs])
    least = watch.iterations * (floor.iteration if len(made.what) else floor.real_iteration)
    if accuracy > 1:
        row |= {"kind": "training", "seconds": seconds, "images_per_second": images / seconds}
        return row | floors.floor(least, rates, "fp32", 1e3 * seconds) | seen
    row |= {"kind": "accuracy", "accuracy": accuracy, "accuracy_reached": watch.best}
    if watch.seconds is None:
        return unavailable(row, f"validation reached {watch.best:.1%} in {epochs} epochs, not {accuracy:.0%}")
    row |= {"seconds": watch.seconds} | floors.floor(least, rates, "fp32", 1e3 * watch.seconds)
    return row | {"telemetry": seen["telemetry"], "throttled": seen.get("throttled", [])}


def training_rows(arguments: argparse.Namespace, device: torch.device, rates: dict[str, float]) -> Iterator[Row]:
    """Images a second of each method, then seconds to an accuracy of each."""
    case = CASES["tiny"]
    digits = DataConfig("digits", classes=(5, 6, 7, 8, 9), per_class=20)
    for method in arguments.methods:
        row = {"kind": "training", "case": case.name, "batch": case.batch, "by": method, "dataset": digits.dataset}
        yield _attempt(row, partial(train, method, case, digits, arguments.epochs, device, rates))
    case = CASES[arguments.case]
    fashion = DataConfig("fashion-mnist", data_root=arguments.data_root or Path(), per_class=arguments.per_class)
    options = {"weights": arguments.source_weights, "accuracy": arguments.accuracy}
    for method in arguments.methods:
        row = {"kind": "accuracy", "case": case.name, "batch": case.batch, "by": method, "dataset": fashion.dataset}
        if arguments.data_root is None:
            yield unavailable(row, "no data: say where Fashion-MNIST is with --data-root")
        else:
            yield _attempt(row, partial(train, method, case, fashion, arguments.most_epochs, device, rates, **options))


def _attempt(row: Row, call: Callable[[], Row]) -> Row:
    try:
        return call()
    except Exception as error:  # one method's failure is its row
        return unavailable(row, error)


def show(row: Row) -> None:
    """One line of the table."""
    title = f"{row['case']} {row.get('dataset', '')} {row['by']}"
    if "unavailable" in row:
        return say(f"{title}: {row['unavailable']}")
    rate = [f"{row['images_per_second']:.0f} images/s"] if "images_per_second" in row else []
    return say(title, [*rate, f"{row['seconds']:.1f} s"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--epochs", type=int, default=2, help="of the run on digits (default 2)")
    parser.add_argument("--data-root", type=Path, help="where Fashion-MNIST is (torchvision's root)")
    parser.add_argument("--case", choices=("tiny", "cifar"), default="cifar", help="networks on Fashion-MNIST")
    parser.add_argument("--per-class", type=int, default=100, help="training images of each class (default 100)")
    parser.add_argument("--accuracy", type=float, default=0.7, help="to reach, a fraction (default 0.7)")
    parser.add_argument("--most-epochs", type=int, default=30, help="after which it is given up (default 30)")
    parser.add_argument("--source-weights", type=Path, help="a checkpoint of the source network")


def run(arguments: argparse.Namespace) -> None:
    """Each method in turn."""
    device = begin("training", arguments)
    rates = device_rates(("fp32",), device)
    append(arguments.output, rates_row(rates))
    write(arguments.output, training_rows(arguments, device, rates), show)
