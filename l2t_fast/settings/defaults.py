"""What the commands do by themselves for each data set, and what excludes each other."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import PureWindowsPath
from typing import Any

from l2t_fast.bounds import BOUNDS, allowed, check_number, shown, within
from l2t_fast.choices import DATASETS, LARGE, METHODS, SMALL
from l2t_fast.errors import L2TError
from l2t_fast.settings.options import EngineOptions, OptimConfig, SourceConfig, TrainConfig

# What `train` does by itself. Small images: the authors' settings (ResNet32 -> VGG9-bn, batch 128); images of 224:
# theirs for ResNet34 -> ResNet18. Digits: small networks, source classes 0-4, ten labelled images of each of 5-9.
_SMALL: dict[str, Any] = {
    "method": ("l2t-ww",),
    "seeds": (0,),
    "source": ("resnet32",),
    "target": "vgg9_bn",
    "source_width": (1.0,),
    "target_width": 1.0,
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "weight_decay": 1e-4,
    "meta_lr": 1e-4,
    "source_epochs": 40,
}
_LARGE: dict[str, Any] = {**_SMALL, "source": ("resnet34",), "target": "resnet18", "batch_size": 64}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        **_SMALL,
        "method": ("scratch", "l2t-ww"),
        "seeds": (0, 1, 2),
        "source": ("resnet8",),
        "target": "vgg9_bn",
        "target_width": 0.25,
        "classes": (5, 6, 7, 8, 9),
        "source_classes": (0, 1, 2, 3, 4),
        "source_epochs": 10,
        "per_class": 10,
        "epochs": 30,
        "batch_size": 25,
        "lr": 0.03,
        "meta_lr": 1e-3,
    },
    "stanford40": {**_LARGE, "meta_lr": 1e-3},  # as the authors told (github.com/alinlab/L2T-ww/issues/4)
}
# What belongs to AdamW rather than to a data set: those of torch.optim.
_ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with what it leaves out filled in for its data set.

    Raises:
        L2TError: a number out of range, a method or seed given twice, settings that exclude each other.
    """
    source = config.source
    if source.source_weights is not None and (source.source_classes or source.source_epochs):
        raise L2TError("a source with --source-weights is not trained: leave out --source-classes and --source-epochs.")
    side = config.data.image_size or DATASETS.get(config.data.dataset, SMALL)
    defaults = dict(_DEFAULTS.get(config.data.dataset, _LARGE if side >= LARGE else _SMALL))
    # Some defaults belong to another: the classes of the source to those of the target, a width to its network.
    if config.data.classes is not None:
        defaults.pop("source_classes", None)
    if config.source.source is not None:
        defaults["source_width"] = (1.0,)
    if config.target.target is not None:
        defaults["target_width"] = 1.0
    if config.optim.optimizer == "adamw":
        defaults |= _ADAMW

    def fill(part: Any) -> Any:
        values = {
            f.name: defaults[f.name]
            for f in dataclasses.fields(part)
            if f.name in defaults and getattr(part, f.name) is None
        }
        return dataclasses.replace(part, **values)

    parts = {name: fill(getattr(config, name)) for name in ("data", "source", "target", "optim")}
    parts["source"] = _for_each_source(parts["source"])
    filled: TrainConfig = dataclasses.replace(fill(config), **parts)
    check(filled)
    return filled


def check(config: TrainConfig) -> None:
    """What `resolve` looks at when all is filled in; settings that were stored are looked at again.

    Raises:
        L2TError: as `resolve`.
    """
    if config.name is not None:
        check_name(config.name)
    check_flag("epochs", config.optim.epochs)
    if config.source.source_epochs is not None:  # a source that is trained by `pretrain` has none
        check_flag("source-epochs", config.source.source_epochs, "epochs")
    check_flag("batch-size", config.optim.batch_size)
    for seed in config.seeds or ():
        check_flag("seeds", seed, "seed")
    for width in config.source.source_width or ():
        check_flag("source-width", width, "width")
    if config.target.target is None:
        raise L2TError("--target None is no network: give its name.")
    check_flag("target-width", config.target.target_width, "width")
    check_flag("workers", config.data.workers)
    for flag, value in (("image-size", config.data.image_size), ("per-class", config.data.per_class)):
        if value is not None:
            check_flag(flag, value)
    for option in dataclasses.fields(EngineOptions):
        value = getattr(config.optim, option.name)
        if option.name in BOUNDS and (value is not None or option.name != "max_grad_norm"):
            check_number(option.name, value)
    check_flag("label-smoothing", config.optim.label_smoothing)
    of_sgd = config.optim.momentum, config.optim.nesterov
    if config.optim.optimizer == "adamw" and of_sgd != (OptimConfig().momentum, OptimConfig().nesterov):
        raise L2TError("--momentum and --nesterov are of SGD: leave them out with --optimizer adamw.")
    check_once("method", config.method or ())
    check_once("seeds", config.seeds or ())
    _check_methods(config.method or (), config.settings)


def check_name(name: str) -> None:
    """Raises L2TError where RUNS/NAME would not be a folder in RUNS, on any system."""
    if name in ("", ".", "..") or not name.isprintable() or PureWindowsPath(name).name != name or len(name) > 200:
        raise L2TError(f"--name {name!r} is not the name of a folder: give letters, digits, dashes and dots.")


def file_name(network: str) -> str:
    """What folders of runs have for the name of a network: timm/resnet10t is timm-resnet10t."""
    return re.sub(r"[^\w.-]+", "-", network)


def _check_methods(names: Sequence[str], settings: Sequence[str]) -> None:
    """Raises L2TError where there is no such method, or a setting that none of them has."""
    if not settings and set(names) <= set(METHODS):
        return
    from l2t_fast.methods import find_method  # and with it torch, which plain settings do without

    methods = [find_method(name, settings) for name in names]
    used = {f"{term}.{keyword}" for method in methods for term, keyword, _ in method.settings}
    used |= {f"{name}.{option}" for name, method in zip(names, methods, strict=True) for option in method.options}
    for setting in settings:
        if setting.partition("=")[0] not in used:
            raise L2TError(f"--settings {setting}: none of the methods given has that setting; leave it out.")


def _for_each_source(source: SourceConfig) -> SourceConfig:
    """With one weight file, one width and one list of layers for each source."""
    names, width = source.source or (), source.source_width or ()
    width = width * len(names) if len(width) == 1 else width
    for flag, values in (("source-weights", source.source_weights), ("source-width", width)):
        if values is not None and len(values) != len(names):
            raise L2TError(f"--{flag} has {len(values)} values for {len(names)} sources: give one for each --source.")
    if len(names) > 1 and source.source_layers is not None and len(source.source_layers) != len(names):
        raise L2TError(
            f"--source-layers has {len(source.source_layers)} lists for {len(names)} sources: join the layers of each "
            "source by commas."
        )
    return dataclasses.replace(source, source_width=width)


def check_flag(flag: str, value: float | None, name: str | None = None) -> None:
    """Raises L2TError where a value is missing, or out of the bounds of `name`, by default the flag's own."""
    name = name or flag.replace("-", "_")
    if within(name, value):
        return
    least, most = BOUNDS[name]
    if value is None or value < least:
        raise L2TError(f"--{flag} {shown(value)} is too small: give at least {least:g}.")
    wrong = "too large" if value > most else "not to be had"
    raise L2TError(f"--{flag} {shown(value)} is {wrong}: give {allowed(name)}.")


def check_once(flag: str, values: Sequence[Any]) -> None:
    """Raises L2TError where a value is missing, or given twice."""
    if not values or len(set(values)) < len(values):
        raise L2TError(f"--{flag} {' '.join(map(str, values))}: give at least one, and each once.")
