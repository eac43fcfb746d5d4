"""The networks, learners and engines that the settings of a run ask for."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2t_fast.data.splits import Data, load_data
from l2t_fast.engine.compile import Say
from l2t_fast.engine.engine import Engine
from l2t_fast.errors import L2TError
from l2t_fast.kernels.adamw.rule import AdamW
from l2t_fast.learner.learner import L2T
from l2t_fast.methods import find_method
from l2t_fast.networks.architectures import VGG9_SIDE, build_model
from l2t_fast.networks.libraries import is_file, ready_made
from l2t_fast.networks.weights import checkpoint_classes, load_weights
from l2t_fast.ranks import Group, current
from l2t_fast.runs.device import why_no_gpu
from l2t_fast.settings.options import EngineOptions, TrainConfig


def find_device(wanted: str) -> torch.device:
    """The device called auto, cpu or cuda.

    Raises:
        L2TError: there is no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise L2TError(f"there is no GPU that PyTorch can use ({why_no_gpu()}): leave out --device cuda, or mend that.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def uses_sources(config: TrainConfig) -> bool:
    """Whether any of the methods needs the source networks."""
    return any(find_method(name).uses_sources for name in config.method or ())


def trains_sources(config: TrainConfig) -> bool:
    """Whether the sources are needed, and have no weights yet."""
    return uses_sources(config) and config.source.source_weights is None


def source_folders(config: TrainConfig, parent: Path) -> list[Path]:
    """The folders of the sources that the run trains itself; none where it trains none."""
    if not trains_sources(config):
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
            "the source network has no weights: give --source-weights FILE (or imagenet, or pretrained for timm's), or "
            "the --source-classes to train it on."
        )
    networks: list[nn.Module] = []
    for s, (name, width) in enumerate(zip(names, widths, strict=True)):
        if not weights:
            torch.manual_seed(s)
            networks.append(build_model(name, len(part.source_classes or ()), width))
        elif not is_file(str(weights[s])):
            networks.append(ready_made(name, str(weights[s])))
        else:
            networks.append(build_model(name, checkpoint_classes(weights[s], name, width), width))
            load_weights(networks[-1], weights[s])
    return networks


def source_data(config: TrainConfig) -> Data:
    """The classes that the sources are trained on, all their images."""
    part = dataclasses.replace(config.data, classes=config.source.source_classes, per_class=None, split=None)
    data = load_data(part, 0)
    _check_classes(data, config)
    return data


def make_learner(
    config: TrainConfig,
    name: str,
    seed: int,
    sources: Sequence[nn.Module],
    data: Data,
    device: torch.device,
    preparing: Callable[[str], None] = lambda what: None,
) -> tuple[nn.Module, L2T, str]:
    """(the target network, its learner, how it starts) of one cell, as `seed` initialises them.

    Args:
        preparing: is told what is being done.

    Raises:
        L2TError: the method cannot be had with these networks.
    """
    method, part = find_method(name, config.settings), config.target
    assert part.target is not None
    assert part.target_width is not None
    names = (part.target, *(config.source.source or () if sources else ()))
    if "vgg9_bn" in names and min(data.image_shape[1:]) < VGG9_SIDE:
        raise L2TError(
            f"vgg9_bn needs images of {VGG9_SIDE} x {VGG9_SIDE} or more, not {data.image_shape[1]} x "
            f"{data.image_shape[2]}: give --image-size {VGG9_SIDE}, or another network."
        )
    preparing("building the networks")
    torch.manual_seed(seed)
    target = build_model(part.target, data.num_classes, part.target_width).to(device)
    for source in sources:
        source.to(device)
    start = method.start(target, sources) if method.start is not None else ""
    if method.pairs is None and not method.terms:
        learner = plain_learner(target, data, device)
    else:
        preparing("finding the layers")
        learner = method.learner(
            sources,
            target,
            source_layers=_source_layers(config, sources),
            target_layers=part.target_layers or None,
            where=config.optim.where,
            example=torch.zeros(2, *data.image_shape, device=device),
        )
    if learner.classes != data.num_classes:
        raise L2TError(
            f"{part.target} has {learner.classes} outputs for {data.num_classes} classes: let it take num_classes, and "
            "have so many."
        )
    return target, learner, start


def _source_layers(config: TrainConfig, sources: Sequence[nn.Module]) -> list[list[str]] | None:
    given = config.source.source_layers
    if given is None:
        return None
    if len(sources) == 1:
        return [[layer for names in given for layer in names.split(",")]]
    return [layers.split(",") for layers in given]


def plain_learner(network: nn.Module, data: Data, device: torch.device) -> L2T:
    """A network that learns from its labels alone."""
    example = torch.zeros(2, *data.image_shape, device=device)
    return L2T([], network, source_layers=[], target_layers=[], pairs=[], example=example)


def method_config(config: TrainConfig, name: str) -> TrainConfig:
    """The settings of one method of a run."""
    options: dict[str, Any] = dict(find_method(name, config.settings).options)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **options))


def make_engine(config: TrainConfig, learner: L2T, say: Say, group: Group = None) -> Engine:
    """The engine that the settings ask for, on the ranks of a group."""
    options: dict[str, Any] = {f.name: getattr(config.optim, f.name) for f in dataclasses.fields(EngineOptions)}
    if config.optim.optimizer == "adamw":
        options["optimizer"] = AdamW(weight_decay=options["weight_decay"])
        for name in ("momentum", "weight_decay", "nesterov"):
            del options[name]
    if config.optim.label_smoothing:
        options["loss"] = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
    return Engine(learner, **options, say=say, group=group)


def check_data(engine: Engine, config: TrainConfig, data: Data) -> None:
    """Raises L2TError where the images do not make batches, or are of one class."""
    _check_classes(data, config)
    batch_size, count = config.optim.batch_size or 0, current().count
    parts = count * engine.accumulate
    if min(batch_size, len(data.train)) < (smallest := count * engine.smallest_batch):
        whose = "BatchNorm needs" if parts == 1 else f"{count} ranks with {engine.accumulate} micro-batches each need"
        raise L2TError(
            f"batches of {min(batch_size, len(data.train))} are too small: {whose} {smallest} images or more."
        )
    if engine.needs_val and data.val.num_batches(batch_size, parts) == 0:
        raise L2TError("--scheme simulation measures L_meta on validation images, but there are none: hold some out.")


def _check_classes(data: Data, config: TrainConfig) -> None:
    if data.num_classes < 2:  # whatever a network says is right
        raise L2TError(f"one class of {config.data.dataset} leaves nothing to tell apart: take two or more.")


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
