"""A source network, trained from scratch as a run of its own."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from l2t_fast.data.splits import load_data
from l2t_fast.files import save_weights
from l2t_fast.networks.architectures import build_model
from l2t_fast.ranks import joined
from l2t_fast.runs.cell import cell_weights, made_with
from l2t_fast.runs.lock import alone
from l2t_fast.runs.run import opened, train
from l2t_fast.settings.defaults import check_flag, file_name, resolve
from l2t_fast.settings.given import check_source
from l2t_fast.settings.options import PRETRAIN_NAMES, PretrainConfig, SourceConfig, TargetConfig, TrainConfig


def pretrain(config: PretrainConfig, console: Console, given: Collection[str] = ()) -> Path:
    """Trains a network from scratch and returns the checkpoint to give as --source-weights.

    It holds the weights that were best by validation, or the last ones without validation images.

    Args and Raises:
        As `run`.
    """
    if config.seed is not None:
        check_flag("seed", config.seed)
    name = config.name
    if name is None:
        name = f"pretrain-{config.data.dataset}-{file_name(config.network or 'resnet32')}"
    asked = TrainConfig(
        name=name,
        runs=config.runs,
        resume=config.resume,
        method=("scratch",),
        seeds=None if config.seed is None else (config.seed,),
        device=config.device,
        log=config.log,
        data=config.data,
        target=TargetConfig(config.network, config.width),
        optim=config.optim,
    )

    def complete(asked: TrainConfig) -> TrainConfig:
        # A source sees all classes and images that it is given: the limits by default are those of targets.
        target = TargetConfig(config.network or "resnet32", config.width or 1.0)
        filled = resolve(dataclasses.replace(asked, target=target, seeds=asked.seeds or (0,)))
        return dataclasses.replace(filled, data=asked.data, source=SourceConfig())

    with joined(config.device) as ranks:
        folder, made, resume = opened(asked, complete, PRETRAIN_NAMES, given)
        check_source(made, folder / "config.json")
        train(folder, made, console if ranks.leads else Console(quiet=True), resume)
        return ranks.first(lambda: _checkpoint(folder, made, console))


def _checkpoint(folder: Path, made: TrainConfig, console: Console) -> Path:
    """Writes the checkpoint, and says how it is used."""
    target, (seed,) = made.target, made.seeds or (0,)
    assert target.target is not None
    assert target.target_width is not None
    classes = load_data(made.data, seed).num_classes
    network = build_model(target.target, classes, target.target_width)
    made_of = {**made_with(made, "scratch"), "seed": str(seed)}
    network.load_state_dict(cell_weights(folder / "scratch" / f"seed-{seed}", network, made_of))
    path = folder / "source.pt"
    with alone(folder):
        save_weights(path, network, classes)
    console.print(
        f"the checkpoint is {path}: --source {target.target} --source-weights {path}"
        + (f" --source-width {target.target_width:g}" if target.target_width != 1 else ""),
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return path
