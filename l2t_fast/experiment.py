"""One run: a source network, then methods x seeds on the target, a table and pictures, in one folder.

runs/NAME/config.json                       the settings, all of them
          source/                           the training of the source, where there was one
          METHOD/seed-K/                    metrics.jsonl, last.pt, best.pt, result.json, pictures
          table.md, table.csv, curves.png   what came out
"""

import csv
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from l2t_fast import plots
from l2t_fast.checkpoint import save_text
from l2t_fast.config import OptimConfig, TrainConfig, load_config, resolve, save_config
from l2t_fast.data import Data, DataConfig, load_data
from l2t_fast.engine import Engine
from l2t_fast.errors import L2TError
from l2t_fast.functions import Say
from l2t_fast.methods import find_method
from l2t_fast.models import build_model, checkpoint_classes, default_layers, load_weights
from l2t_fast.progress import Display, StopSignal, TrainingWatch
from l2t_fast.trainer import Schedule, fit, read_epochs
from l2t_fast.transfer import L2T

_PICTURE_IMAGES = 512  # training images whose channel weights the histogram shows


def run(config: TrainConfig, console: Console) -> Path:
    """Trains what `config` asks for and returns the folder of the run.

    Raises:
        Interrupted: stopped by the user, with everything saved.
        L2TError: bad settings, missing data, a folder that exists already, a training that diverged.
    """
    folder, config = _open(config)
    seeds, methods = config.seeds or (), config.method or ()
    # Everything that can be wrong with the settings is found before the folder is made.
    data = load_data(config.data, seeds[0])
    device = _device(config.device)
    source = _build_source(config)
    if source is not None and config.source.source_weights is None:
        _source_data(config)
    for name in methods:
        _, learner = _learner(config, name, seeds[0], source, data, device)
        _check_data(_engine(config, learner, 0, lambda text: None), config, data)
        console.print(_describe(config, name, data, learner, device), highlight=False, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.json")
    console.print(f"folder of the run: [bold]{folder}[/]", highlight=False, soft_wrap=True)

    with Display(console) as display, StopSignal().listening(console) as stop:
        trainings = _Trainings(config, source, device, display, stop)
        if source is not None and config.source.source_weights is None:
            trainings.of_source(folder / "source", source)
        for seed in seeds:
            data = load_data(config.data, seed)
            for name in methods:
                cell = folder / name / f"seed-{seed}"
                if not (cell / "result.json").exists():
                    trainings.of_cell(cell, name, seed, data)
    report(folder, config, console)
    return folder


@dataclass(frozen=True)
class _Trainings:
    """The trainings of one run, which share the source, the display and the way to stop."""

    config: TrainConfig
    source: nn.Module | None
    device: torch.device
    display: Display
    stop: StopSignal

    def of_source(self, folder: Path, source: nn.Module) -> None:
        """Trains the source, in place, on its classes of the data set."""
        classes = self.config.source.source_classes or ()
        seed = (self.config.seeds or (0,))[0]
        data = _source_data(self.config)
        source.to(self.device).requires_grad_()  # the learners that checked the settings have frozen it
        learner = _plain_learner(source, data, self.device)
        title = f"source, classes {' '.join(map(str, classes))}"
        self._fit(folder, title, seed, self.config.source.source_epochs, source, learner, data)

    def of_cell(self, folder: Path, name: str, seed: int, data: Data) -> None:
        """Trains one method with one seed, and draws what it learned."""
        target, learner = _learner(self.config, name, seed, self.source, data, self.device)
        result = self._fit(folder, f"{name}, seed {seed}", seed, self.config.optim.epochs, target, learner, data)
        _draw_weights(folder, learner, data, f"{name}, {self.config.data.dataset}, seed {seed}")
        save_text(folder / "result.json", json.dumps(result, indent=2) + "\n")  # last: the cell is done

    def _fit(
        self, folder: Path, title: str, seed: int, epochs: int | None, network: nn.Module, learner: L2T, data: Data
    ) -> dict[str, Any]:
        optim = self.config.optim
        assert epochs is not None
        assert optim.lr is not None
        assert optim.batch_size is not None
        parts = {part: getattr(data, part).to(self.device) for part in ("train", "val", "test")}
        watch = TrainingWatch(self.display, title, epochs, data.train.num_batches(optim.batch_size), self.stop)
        schedule = Schedule(epochs, optim.batch_size, optim.lr, seed)
        engine = _engine(self.config, learner, epochs * data.train.num_batches(optim.batch_size), watch.say)
        result = fit(folder, engine, network, dataclasses.replace(data, **parts), schedule, watch)
        watch.done(result["test_accuracy_last"])
        return result


def _check_data(engine: Engine, config: TrainConfig, data: Data) -> None:
    batch_size = config.optim.batch_size or 0
    if min(batch_size, len(data.train)) < engine.smallest_batch:
        raise L2TError(
            f"batches of {min(batch_size, len(data.train))} are too small: BatchNorm needs {engine.smallest_batch} "
            "images or more."
        )
    if engine.needs_val and data.val.num_batches(batch_size) == 0:
        raise L2TError("--scheme simulation measures L_meta on validation images, but there are none: hold some out.")


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise L2TError("there is no GPU that PyTorch can use: leave out --device cuda.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def _open(config: TrainConfig) -> tuple[Path, TrainConfig]:
    """The folder of the run, and its complete settings."""
    if not config.resume:
        name = config.name or f"{config.data.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = config.runs / name
        if folder.exists():
            raise L2TError(
                f"the run folder {folder} exists already: give another --name, or go on with it by --resume."
            )
        return folder, resolve(dataclasses.replace(config, name=name))
    if config.name is None:
        made = [path.parent for path in config.runs.glob("*/config.json")]
        if not made:
            raise L2TError(f"there is no run under {config.runs} to resume: start one without --resume.")
        folder = max(made, key=lambda path: (path / "config.json").stat().st_mtime)
    else:
        folder = config.runs / config.name
        if not folder.exists():
            raise L2TError(f"there is no run folder {folder} to resume: start it without --resume.")
    saved = load_config(folder / "config.json")
    _check_same(config, saved, TrainConfig())
    # Where the data lie and what computes may have changed since.
    data = dataclasses.replace(saved.data, **_given(config.data, DataConfig(), ("data_root", "workers")))
    optim = dataclasses.replace(saved.optim, **_given(config.optim, OptimConfig(), ("mode", "memory")))
    return folder, dataclasses.replace(saved, data=data, optim=optim, **_given(config, TrainConfig(), ("device",)))


_ELSEWHERE = ("name", "runs", "resume", "device", "mode", "memory", "data_root", "workers", "download")


def _given(config: Any, usual: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(usual, name)}


def _check_same(given: Any, saved: Any, default: Any) -> None:
    """A resumed run keeps its settings: those given again must be the same."""
    for f in dataclasses.fields(given):
        ours, theirs, usual = getattr(given, f.name), getattr(saved, f.name), getattr(default, f.name)
        if dataclasses.is_dataclass(ours):
            _check_same(ours, theirs, usual)
        elif f.name not in _ELSEWHERE and ours != usual and ours != theirs:
            flag = f.name.replace("_", "-")
            raise L2TError(f"the run was started with --{flag} {theirs}, not {ours}: resume it without --{flag}.")


def _build_source(config: TrainConfig) -> nn.Module | None:
    """The source network, with weights or yet to be trained on `source_classes`; None if no method needs one."""
    part = config.source
    assert part.source is not None
    assert part.source_width is not None
    if all(find_method(name).pairs is None for name in config.method or ()):
        return None
    if part.source_weights == "imagenet":
        try:
            network: nn.Module = torchvision.models.get_model(part.source, weights="DEFAULT")
        except (ValueError, OSError) as error:
            raise L2TError(
                f"torchvision's ImageNet weights of '{part.source}' cannot be had ({error}): give a checkpoint file."
            ) from error
        return network
    if part.source_weights is not None:
        network = build_model(part.source, checkpoint_classes(part.source_weights), part.source_width)
        load_weights(network, part.source_weights)
        return network
    if not part.source_classes:
        raise L2TError(
            "the source network has no weights: give --source-weights FILE (or imagenet), or the --source-classes to "
            "train it on."
        )
    torch.manual_seed((config.seeds or (0,))[0])
    return build_model(part.source, len(part.source_classes), part.source_width)


def _source_data(config: TrainConfig) -> Data:
    """The classes that the source is trained on, all their images."""
    part = dataclasses.replace(config.data, classes=config.source.source_classes, per_class=None, split=None)
    return load_data(part, (config.seeds or (0,))[0])


def _learner(
    config: TrainConfig, name: str, seed: int, source: nn.Module | None, data: Data, device: torch.device
) -> tuple[nn.Module, L2T]:
    """(the target network, its learner) of one cell, as `seed` initialises them."""
    method, part = find_method(name), config.target
    assert part.target is not None
    assert part.target_width is not None
    torch.manual_seed(seed)
    target = build_model(part.target, data.num_classes, part.target_width).to(device)
    if method.pairs is None or source is None:
        return target, _plain_learner(target, data, device)
    assert config.source.source is not None
    learner = L2T(
        source.to(device),
        target,
        source_layers=config.source.source_layers or default_layers(config.source.source, source),
        target_layers=part.target_layers or default_layers(part.target, target),
        pairs=method.pairs,
        what=method.what,
        where=method.where,
        example=torch.zeros(2, *data.image_shape, device=device),
    )
    return target, learner


def _plain_learner(network: nn.Module, data: Data, device: torch.device) -> L2T:
    """A network that learns from its labels alone."""
    example = torch.zeros(2, *data.image_shape, device=device)
    return L2T([], network, source_layers=[], target_layers=[], pairs=[], example=example)


def _engine(config: TrainConfig, learner: L2T, iterations: int, say: Say) -> Engine:
    optim = config.optim
    assert optim.lr is not None
    assert optim.meta_lr is not None
    return Engine(
        learner,
        lr=optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        nesterov=optim.nesterov,
        meta_lr=optim.meta_lr,
        meta_weight_decay=optim.meta_weight_decay,
        beta=optim.beta,
        inner_steps=optim.inner_steps,
        scheme=optim.scheme,
        mode=optim.mode,
        precision=optim.precision,
        memory=optim.memory,
        iterations=iterations,
        say=say,
    )


def _draw_weights(cell: Path, learner: L2T, data: Data, title: str) -> None:
    """The pictures of what was learned: λ over the epochs, w at the end."""
    names = [_pair_name(learner, pair) for pair in learner.pairs]
    epochs = read_epochs(cell / "metrics.jsonl")
    if len(learner.where):
        plots.plot_pair_weights(cell / "pair_weights.png", [row["pair_weights"] for row in epochs], names, title)
    if len(learner.what):
        device = next(learner.parameters()).device
        count = min(_PICTURE_IMAGES, len(data.train))
        some = data.train.select(torch.arange(count), data.train.labels[:count], augment=False)
        weights: list[list[Tensor]] = []
        with torch.no_grad():
            for x, _ in some.to(device).eval_batches(128):
                weights.append(learner.weights(learner.source_features(x))[0])
        merged = [torch.cat(parts).cpu().numpy() for parts in zip(*weights, strict=True)]  # [N, C_s] of each pair
        plots.plot_channel_weights(cell / "channel_weights.png", merged, names, title)


def _pair_name(learner: L2T, pair: Sequence[int]) -> str:
    source, m, n = pair
    prefix = f"{source}:" if len(learner.sources) > 1 else ""
    return f"{prefix}{learner.source_layers[source][m]} → {learner.target_layers[n]}"


def _describe(config: TrainConfig, name: str, data: Data, learner: L2T, device: torch.device) -> str:
    parameters = sum(p.numel() for p in learner.target.parameters())
    networks = f"{config.target.target} ({parameters / 1e6:.2f} M parameters)"
    if learner.pairs:
        networks = f"{config.source.source} → {networks}, {len(learner.pairs)} pairs"
    images = f"{len(data.train)} training, {len(data.val)} validation, {len(data.test)} test images"
    return f"{name}: {networks}; {config.data.dataset}, {data.num_classes} classes, {images}; {device}"


def report(folder: Path, config: TrainConfig, console: Console) -> None:
    """Prints the table of a finished run and writes table.md, table.csv and curves.png."""
    methods: Sequence[str] = config.method or ()
    seeds = config.seeds or ()
    header = ["method", "test, best by validation (%)", "test, last (%)", "seeds", "iterations", "seconds"]
    lines, curves = [], {}
    for name in methods:
        cells = [folder / name / f"seed-{seed}" for seed in seeds]
        results = [json.loads((cell / "result.json").read_text()) for cell in cells]
        curves[name] = [read_epochs(cell / "metrics.jsonl") for cell in cells]
        lines.append(
            [
                name,
                _mean_std([100 * r["test_accuracy_best"] for r in results if "test_accuracy_best" in r]),
                _mean_std([100 * r["test_accuracy_last"] for r in results]),
                str(len(results)),
                str(results[0]["iterations"]),
                _mean_std([r["seconds"] for r in results]),
            ]
        )
    plots.plot_curves(folder / "curves.png", curves, config.data.dataset)
    table = Table(title=f"{config.data.dataset}: accuracy on the test set", title_justify="left")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 0 else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    markdown = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    (folder / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in markdown))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    console.print(f"table, curves and pictures are in {folder}", highlight=False, soft_wrap=True)


def _mean_std(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
