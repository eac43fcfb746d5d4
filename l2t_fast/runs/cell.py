"""One training: the networks of a run, and a method with a seed (a cell of a table), in a folder of its own.

METHOD/seed-K/   metrics.jsonl, last.pt, best.pt, pairs.json, learned.json and pictures where weights were learned, and
                 then result.json: the cell is done; target.* where the target is exported
source/          (source-1/, source-2/, ... of several) the same of a source network, and source.pt: its checkpoint
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.choices import Export
from l2t_fast.data.splits import Data
from l2t_fast.files import load_checkpoint, save_text, save_weights
from l2t_fast.learner.learner import L2T
from l2t_fast.ranks import current
from l2t_fast.reports.column import read_result
from l2t_fast.reports.pictures import weights as plots
from l2t_fast.runs.build import build_sources, make_engine, make_learner, method_config, plain_learner, source_data
from l2t_fast.runs.made import cell_settings, inputs, layers, shared_settings
from l2t_fast.runs.progress import MakeWatch, RunWatch
from l2t_fast.runs.tensorboard import ToTensorBoard
from l2t_fast.settings.options import TrainConfig
from l2t_fast.training.export import FILES, export
from l2t_fast.training.fit import Schedule, fit
from l2t_fast.training.learned import pair_names, peakedness
from l2t_fast.training.log import read_epochs
from l2t_fast.training.state import check_made, load_best
from l2t_fast.training.trackers import ToCsv

_TRACKERS = {"tensorboard": ToTensorBoard, "csv": ToCsv}  # of --log
_PICTURE_IMAGES = 512  # training images whose channel weights the histogram shows


def train_source(folder: Path, config: TrainConfig, s: int, device: torch.device, make_watch: MakeWatch) -> None:
    """Trains source s on its classes of the data set; folder/source.pt is the checkpoint."""
    classes = " ".join(map(str, config.source.source_classes or ()))
    number = f" {s + 1}" if len(config.source.source or ()) > 1 else ""
    title, epochs = f"source{number}, classes {classes}", config.source.source_epochs or 0
    watch = make_watch(title, epochs, 0)
    watch.preparing("reading the images")
    data = source_data(config)
    watch.preparing("building the networks")
    network = build_sources(config)[s].to(device)
    learner = plain_learner(network, data, device)
    what = {"part": title, **shared_settings(config)}
    _fit(folder, title, config, s, epochs, network, learner, data, watch, what)
    current().first(lambda: save_weights(folder / "source.pt", network, data.num_classes))


def train_cell(
    folder: Path,
    config: TrainConfig,
    name: str,
    seed: int,
    sources: Sequence[nn.Module],
    data: Data,
    device: torch.device,
    watch: RunWatch,
    callbacks: Sequence[object] = (),
) -> None:
    """Trains one method with one seed, writes what it learned, and exports the target; what is there is left alone.

    callbacks: as for `fit`.
    """
    config = method_config(config, name)
    target, learner, _ = make_learner(config, name, seed, sources, data, device, watch.preparing)
    first = current().first
    what = made_with(config, name)
    made = {**what, "seed": str(seed)}
    if not first(lambda: (folder / "result.json").exists()):
        title, epochs = f"{name}, seed {seed}", config.optim.epochs or 0
        learns = bool(len(learner.what) or len(learner.where))
        if learns:
            first(lambda: save_text(folder / "pairs.json", json.dumps(_named_pairs(learner)) + "\n"))
        of_all = {**what, **layers(learner)}
        result = _fit(folder, title, config, seed, epochs, target, learner, data, watch, of_all, callbacks)

        def write() -> None:
            if learns:
                _write_learned(folder, learner, data, f"{name}, {config.data.dataset}, seed {seed}")
            save_text(folder / "result.json", json.dumps({**result, "made": made}, indent=2) + "\n")

        first(write)

    def write_exports() -> None:
        for form in not_exported(folder, config):
            target.load_state_dict(cell_weights(folder, target, made))
            export(target, folder / FILES[form], torch.zeros(2, *data.image_shape))

    first(write_exports)


def not_exported(folder: Path, config: TrainConfig) -> list[Export]:
    """The formats that the target of a cell is still to be written in."""
    return [form for form in config.export if not (folder / FILES[form]).exists()]


def made_with(config: TrainConfig, name: str) -> dict[str, str]:
    """The method of a cell and its settings, by flag."""
    return {"--method": name, **cell_settings(method_config(config, name))}


def cell_weights(folder: Path, network: nn.Module, made: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of its target `network` that were best by validation, or the last ones without validation images.

    Raises:
        L2TError: those in the folder are damaged, or of another training than `made` says.
    """
    best = folder / "best.pt"
    if best.exists():
        return load_best(best, network, made, read_result(folder / "result.json").get("best_epoch"))
    path = folder / "last.pt"
    content = load_checkpoint(path)
    check_made(f"checkpoint {path}", content.get("made", {}), made)
    state: dict[str, dict[str, Tensor]] = content["engine"]
    theta = {name.removeprefix("target."): p for name, p in state["theta"].items() if name.startswith("target.")}
    return theta | state["buffers"]


def _fit(
    folder: Path,
    title: str,
    config: TrainConfig,
    seed: int,
    epochs: int,
    network: nn.Module,
    learner: L2T,
    data: Data,
    watch: RunWatch,
    what: Mapping[str, str],
    callbacks: Sequence[object] = (),
) -> dict[str, Any]:
    optim = config.optim
    assert optim.lr is not None
    assert optim.batch_size is not None
    device = next(network.parameters()).device
    parts = {part: getattr(data, part).to(device) for part in ("train", "val", "test")}
    ranks = current()
    schedule = Schedule(epochs, optim.batch_size, optim.lr, seed)
    watch.preparing("examining the networks")
    engine = make_engine(config, learner, watch.say, ranks.group)
    made = {**what, "seed": str(seed), **inputs(learner.sources, data)}
    told = [*callbacks, *(_TRACKERS[name]() for name in config.log)]
    watch.begins(data.train.num_batches(optim.batch_size, ranks.count * optim.accumulate))
    size = "x".join(map(str, data.image_shape[1:]))
    watch.preparing(f"first step, on {min(optim.batch_size, len(data.train))} images of {size}")
    result = fit(folder, engine, network, dataclasses.replace(data, **parts), schedule, watch, made, told, title)
    watch.done(result["test_accuracy_last"])
    return result


def _write_learned(cell: Path, learner: L2T, data: Data, title: str) -> None:
    """learned.json and the pictures of it: λ over the epochs, w at the end."""
    learned: dict[str, Any] = dict(_named_pairs(learner))
    names = learned["pairs"]
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
        plots.plot_pair_weights(
            cell / "pair_weights.png", [row["pair_weights"] for row in epochs if "pair_weights" in row], names, title
        )
        learned["pair_weights"] = [x.mean().item() for x in lam]
    if len(learner.what):
        plots.plot_channel_weights(cell / "channel_weights.png", [x.numpy() for x in w], names, title)
        learned["channels"] = [peakedness(x) for x in w]
    save_text(cell / "learned.json", json.dumps(learned) + "\n")


def _named_pairs(learner: L2T) -> dict[str, list[str]]:
    """What learned.json has of the pairs, and before there is one pairs.json."""
    return {
        "pairs": pair_names(learner),
        "source": [learner.source_layers[s][m] for s, m, _ in learner.pairs],
        "target": [learner.target_layers[n] for _, _, n in learner.pairs],
    }
