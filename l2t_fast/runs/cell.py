"""One training: the networks of a run, and a method with a seed (a cell of a table), in a folder of its own.

METHOD/seed-K/   metrics.jsonl, last.pt, best.pt, learned.json and pictures where weights were learned, and, last of
                 all, result.json: the cell is done
source/          (source-1/, source-2/, ... of several) the same of a source network, and source.pt: its checkpoint
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.data.splits import Data
from l2t_fast.files import load_checkpoint, save_text, save_weights
from l2t_fast.learner.learner import L2T
from l2t_fast.reports.pictures import weights as plots
from l2t_fast.runs.build import build_sources, make_engine, make_learner, method_config, plain_learner, source_data
from l2t_fast.runs.made import cell_settings, inputs, layers, shared_settings
from l2t_fast.runs.progress import MakeWatch
from l2t_fast.settings.options import TrainConfig
from l2t_fast.training.fit import Schedule, fit
from l2t_fast.training.learned import peakedness
from l2t_fast.training.log import read_epochs

_PICTURE_IMAGES = 512  # training images whose channel weights the histogram shows


def train_source(folder: Path, config: TrainConfig, s: int, device: torch.device, make_watch: MakeWatch) -> None:
    """Trains source s on its classes of the data set; folder/source.pt is the checkpoint."""
    data = source_data(config)
    network = build_sources(config)[s].to(device)
    learner = plain_learner(network, data, device)
    classes = " ".join(map(str, config.source.source_classes or ()))
    number = f" {s + 1}" if len(config.source.source or ()) > 1 else ""
    title = f"source{number}, classes {classes}"
    what = {"part": title, **shared_settings(config)}
    _fit(folder, title, config, s, config.source.source_epochs, network, learner, data, make_watch, what)
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
    config = method_config(config, name)
    target, learner, _ = make_learner(config, name, seed, sources, data, device)
    title = f"{name}, seed {seed}"
    what = {"--method": name, **cell_settings(config), **layers(learner)}
    result = _fit(folder, title, config, seed, config.optim.epochs, target, learner, data, make_watch, what)
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
    what: Mapping[str, str],
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
    watch.say("building the engine: passes on two images show how the target can be differentiated twice\n")
    engine = make_engine(config, learner, watch.say)
    if not (folder / "last.pt").exists():
        size = "x".join(map(str, data.image_shape[1:]))
        watch.say(f"first iteration, on {min(optim.batch_size, len(data.train))} images of {size}\n")
    made = {**what, "seed": str(seed), **inputs(learner.sources, data)}
    result = fit(folder, engine, network, dataclasses.replace(data, **parts), schedule, watch, made)
    watch.done(result["test_accuracy_last"])
    return result


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
