"""One training: the networks of a run, and a method with a seed (a cell of a table), in a folder of its own.

METHOD/seed-K/   metrics.jsonl, last.pt, best.pt, learned.json and pictures where weights were learned, and, last of
                 all, result.json: the cell is done
source/          (source-1/, source-2/, ... of several) the same of a source network, and source.pt: its checkpoint
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torchvision
from torch import Tensor, nn

from l2t_fast.data.images import Data, load_data
from l2t_fast.engine.compile import Say
from l2t_fast.engine.engine import Engine
from l2t_fast.errors import L2TError
from l2t_fast.files import load_checkpoint, save_text, save_weights
from l2t_fast.learner.learner import L2T
from l2t_fast.methods import find_method
from l2t_fast.networks.architectures import build_model, checkpoint_classes, default_layers, load_weights
from l2t_fast.reports.inspection import peakedness
from l2t_fast.reports.pictures import weights as plots
from l2t_fast.settings.options import OptimConfig, TrainConfig
from l2t_fast.training.fit import Schedule, Watch, fit
from l2t_fast.training.log import read_epochs

_PICTURE_IMAGES = 512  # training images whose channel weights the histogram shows


class Progress(Watch, Protocol):
    """A watch that also passes on what an engine says."""

    def say(self, text: str) -> None:
        """A piece of text, as it comes."""

    def done(self, accuracy: float) -> None:
        """The training is over, with this accuracy on the test set."""


MakeWatch = Callable[[str, int, int], Progress]  # (title, epochs, batches of an epoch)


def find_device(wanted: str) -> torch.device:
    """The device called auto, cpu or cuda.

    Raises:
        L2TError: there is no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise L2TError("there is no GPU that PyTorch can use: leave out --device cuda.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def uses_sources(config: TrainConfig) -> bool:
    """Whether any of the methods needs the source networks."""
    return any(find_method(name).uses_sources for name in config.method or ())


def source_folders(config: TrainConfig, parent: Path) -> list[Path]:
    """The folders of the sources that the run trains itself; none where they have weights, or are not needed."""
    if not uses_sources(config) or config.source.source_weights is not None:
        return []
    count = len(config.source.source or ())
    return [parent / "source"] if count == 1 else [parent / f"source-{s + 1}" for s in range(count)]


def build_sources(config: TrainConfig, folders: Sequence[Path] = ()) -> list[nn.Module]:
    """The source networks: with the given weights, those in `folders`, or, without either, as they start.

    Several that start alike get seeds of their own.

    Raises:
        L2TError: there are neither weights nor classes to train them on; weights that cannot be had or do not fit.
    """
    part = config.source
    if not uses_sources(config):
        return []
    names, widths = part.source or (), part.source_width or ()
    weights: Sequence[str | Path] = part.source_weights or [folder / "source.pt" for folder in folders]
    if not weights and not part.source_classes:
        raise L2TError(
            "the source network has no weights: give --source-weights FILE (or imagenet), or the --source-classes to "
            "train it on."
        )
    networks: list[nn.Module] = []
    for s, (name, width) in enumerate(zip(names, widths, strict=True)):
        if not weights:
            torch.manual_seed(s)
            networks.append(build_model(name, len(part.source_classes or ()), width))
        elif weights[s] == "imagenet":
            networks.append(_imagenet(name))
        else:
            networks.append(build_model(name, checkpoint_classes(weights[s]), width))
            load_weights(networks[-1], weights[s])
    return networks


def _imagenet(name: str) -> nn.Module:
    try:
        network: nn.Module = torchvision.models.get_model(name, weights="DEFAULT")
    except (ValueError, OSError) as error:
        raise L2TError(
            f"torchvision's ImageNet weights of '{name}' cannot be had ({error}): give a checkpoint file."
        ) from error
    return network


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Of what the settings only point at, the SHA-256: weights of sources, split files; of a folder its place."""
    weights = [Path(name) for name in config.source.source_weights or () if name != "imagenet"]
    splits = [Path(f"{config.data.split}-{part}") for part in ("train", "val", "test")] if config.data.split else []
    found = {
        f"{kind} {i + 1}": hashlib.sha256(path.expanduser().read_bytes()).hexdigest()
        for kind, paths in (("source-weights", weights if uses_sources(config) else []), ("split", splits))
        for i, path in enumerate(paths)
    }
    if config.data.dataset == "folder":
        found["data-root"] = str(config.data.data_root.expanduser().resolve())
    return found


def source_data(config: TrainConfig) -> Data:
    """The classes that the sources are trained on, all their images."""
    part = dataclasses.replace(config.data, classes=config.source.source_classes, per_class=None, split=None)
    return load_data(part, 0)


def train_source(folder: Path, config: TrainConfig, s: int, device: torch.device, make_watch: MakeWatch) -> None:
    """Trains source s on its classes of the data set; folder/source.pt is the checkpoint."""
    data = source_data(config)
    network = build_sources(config)[s].to(device)
    learner = _plain_learner(network, data, device)
    classes = " ".join(map(str, config.source.source_classes or ()))
    number = f" {s + 1}" if len(config.source.source or ()) > 1 else ""
    title = f"source{number}, classes {classes}"
    _fit(folder, title, config, s, config.source.source_epochs, network, learner, data, make_watch)
    save_weights(folder / "source.pt", network, data.num_classes)


def train_cell(
    folder: Path,
    config: TrainConfig,
    name: str,
    seed: int,
    sources: Sequence[nn.Module],
    data: Data,
    device: torch.device,
    make_watch: MakeWatch,
) -> dict[str, Any]:
    """Trains one method with one seed, writes what it learned, and returns the content of result.json."""
    target, learner, _ = make_learner(config, name, seed, sources, data, device)
    title = f"{name}, seed {seed}"
    result = _fit(folder, title, config, seed, config.optim.epochs, target, learner, data, make_watch)
    if len(learner.what) or len(learner.where):
        _write_learned(folder, learner, data, f"{name}, {config.data.dataset}, seed {seed}")
    save_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def cell_weights(folder: Path) -> dict[str, Tensor]:
    """The target's weights that were best by validation, or the last ones without validation images."""
    best = folder / "best.pt"
    if best.exists():
        weights: dict[str, Tensor] = load_checkpoint(best)["weights"]
        return weights
    state: dict[str, dict[str, Tensor]] = load_checkpoint(folder / "last.pt")["engine"]
    theta = {name.removeprefix("target."): p for name, p in state["theta"].items() if name.startswith("target.")}
    return theta | state["buffers"]


def _fit(
    folder: Path,
    title: str,
    config: TrainConfig,
    seed: int,
    epochs: int | None,
    network: nn.Module,
    learner: L2T,
    data: Data,
    make_watch: MakeWatch,
) -> dict[str, Any]:
    optim = config.optim
    assert epochs is not None
    assert optim.lr is not None
    assert optim.batch_size is not None
    device = next(network.parameters()).device
    parts = {part: getattr(data, part).to(device) for part in ("train", "val", "test")}
    batches = data.train.num_batches(optim.batch_size)
    watch = make_watch(title, epochs, batches)
    schedule = Schedule(epochs, optim.batch_size, optim.lr, seed)
    engine = make_engine(config, learner, epochs * batches, watch.say)
    result = fit(folder, engine, network, dataclasses.replace(data, **parts), schedule, watch)
    watch.done(result["test_accuracy_last"])
    return result


def make_learner(
    config: TrainConfig, name: str, seed: int, sources: Sequence[nn.Module], data: Data, device: torch.device
) -> tuple[nn.Module, L2T, str]:
    """(the target network, its learner, how it starts) of one cell, as `seed` initialises them.

    Raises:
        L2TError: the method cannot be had with these networks.
    """
    method, part = find_method(name, config.settings), config.target
    assert part.target is not None
    assert part.target_width is not None
    torch.manual_seed(seed)
    target = build_model(part.target, data.num_classes, part.target_width).to(device)
    for source in sources:
        source.to(device)
    start = method.start(target, sources) if method.start is not None else ""
    if method.pairs is None and not method.terms:
        return target, _plain_learner(target, data, device), start
    learner = method.learner(
        sources,
        target,
        source_layers=_source_layers(config, sources),
        target_layers=part.target_layers or default_layers(part.target, target),
        where=config.optim.where,
        example=torch.zeros(2, *data.image_shape, device=device),
    )
    return target, learner, start


def _source_layers(config: TrainConfig, sources: Sequence[nn.Module]) -> list[list[str]]:
    names, given = config.source.source or (), config.source.source_layers
    if given is None:
        return [default_layers(name, source) for name, source in zip(names, sources, strict=True)]
    if len(sources) == 1:
        return [[layer for names in given for layer in names.split(",")]]
    return [layers.split(",") for layers in given]


def _plain_learner(network: nn.Module, data: Data, device: torch.device) -> L2T:
    """A network that learns from its labels alone."""
    example = torch.zeros(2, *data.image_shape, device=device)
    return L2T([], network, source_layers=[], target_layers=[], pairs=[], example=example)


def make_engine(config: TrainConfig, learner: L2T, iterations: int, say: Say) -> Engine:
    """The engine that the settings ask for."""
    elsewhere = ("epochs", "batch_size", "where")
    names = [f.name for f in dataclasses.fields(OptimConfig) if f.name not in elsewhere]
    options = {name: getattr(config.optim, name) for name in names}
    return Engine(learner, **options, iterations=iterations, say=say)


def check_data(engine: Engine, config: TrainConfig, data: Data) -> None:
    """Raises L2TError where the images do not make batches."""
    batch_size = config.optim.batch_size or 0
    if min(batch_size, len(data.train)) < engine.smallest_batch:
        raise L2TError(
            f"batches of {min(batch_size, len(data.train))} are too small: BatchNorm needs {engine.smallest_batch} "
            "images or more."
        )
    if engine.needs_val and data.val.num_batches(batch_size) == 0:
        raise L2TError("--scheme simulation measures L_meta on validation images, but there are none: hold some out.")


def describe(config: TrainConfig, name: str, data: Data, learner: L2T, start: str) -> str:
    """A line on what a method trains."""
    method = find_method(name)
    parameters = sum(p.numel() for p in learner.target.parameters())
    networks = f"{config.target.target} ({parameters / 1e6:.2f} M parameters)"
    if method.uses_sources:
        networks = f"{' + '.join(config.source.source or ())} → {networks}"
    for more in (f"{len(learner.pairs)} pairs" if learner.pairs else "", start):
        networks += f", {more}" if more else ""
    images = f"{len(data.train)} training, {len(data.val)} validation, {len(data.test)} test images"
    return f"{name}: {networks}; {config.data.dataset}, {data.num_classes} classes, {images}"


def _write_learned(cell: Path, learner: L2T, data: Data, title: str) -> None:
    """learned.json and the pictures of it: λ over the epochs, w at the end."""
    names = [_pair_name(learner, pair) for pair in learner.pairs]
    learned: dict[str, Any] = {
        "pairs": names,
        "source": [learner.source_layers[s][m] for s, m, _ in learner.pairs],
        "target": [learner.target_layers[n] for _, _, n in learner.pairs],
    }
    device = next(learner.parameters()).device
    count = min(_PICTURE_IMAGES, len(data.train))
    spread = torch.linspace(0, len(data.train) - 1, count).long()  # they may be sorted by class
    some = data.train.select(spread, data.train.labels[spread], augment=False)
    batches: list[tuple[list[Tensor], list[Tensor]]] = []
    with torch.no_grad():
        for x, _ in some.to(device).eval_batches(128):
            batches.append(learner.weights(learner.source_features(x)))
    w, lam = ([torch.cat(parts).cpu() for parts in zip(*kind, strict=True)] for kind in zip(*batches, strict=True))
    if len(learner.where):
        epochs = read_epochs(cell / "metrics.jsonl")
        plots.plot_pair_weights(cell / "pair_weights.png", [row["pair_weights"] for row in epochs], names, title)
        learned["pair_weights"] = [x.mean().item() for x in lam]
    if len(learner.what):
        plots.plot_channel_weights(cell / "channel_weights.png", [x.numpy() for x in w], names, title)
        learned["channels"] = [peakedness(x) for x in w]
    save_text(cell / "learned.json", json.dumps(learned) + "\n")


def _pair_name(learner: L2T, pair: Sequence[int]) -> str:
    source, m, n = pair
    prefix = f"{source}:" if len(learner.sources) > 1 else ""
    return f"{prefix}{learner.source_layers[source][m]} → {learner.target_layers[n]}"
