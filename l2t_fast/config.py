"""What `l2t-fast train` can be told, and what it does by itself for each data set."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from l2t_fast.bilevel import Memory, Scheme
from l2t_fast.checkpoint import save_text
from l2t_fast.data import DataConfig
from l2t_fast.engine import Mode
from l2t_fast.errors import L2TError
from l2t_fast.methods import MethodName
from l2t_fast.precision import Precision


@dataclass(frozen=True)
class SourceConfig:
    """The source network, whose features are matched."""

    source: str | None = None
    """its architecture: resnet32, vgg9_bn, or any classification network of torchvision"""
    source_weights: str | None = None
    """a checkpoint file, or `imagenet` for torchvision's own weights"""
    source_width: float | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn"""
    source_layers: tuple[str, ...] | None = None
    """layers to match, named as in named_modules()"""
    source_classes: tuple[int, ...] | None = None
    """without weights: first train the source on these classes of the data set"""
    source_epochs: int | None = None
    """epochs of that training"""


@dataclass(frozen=True)
class TargetConfig:
    """The target network, which is trained."""

    target: str | None = None
    """its architecture: vgg9_bn, resnet32, or any classification network of torchvision"""
    target_width: float | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn"""
    target_layers: tuple[str, ...] | None = None
    """layers to match, named as in named_modules()"""


@dataclass(frozen=True)
class OptimConfig:
    """The iteration: SGD on the target, Adam on the meta-networks, cosine annealing over the epochs."""

    epochs: int | None = None
    """passes over the training images"""
    batch_size: int | None = None
    """images in a batch"""
    lr: float | None = None
    """learning rate of SGD at the start"""
    momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 1e-4
    """weight decay of SGD"""
    nesterov: bool = False
    """Nesterov's form of momentum"""
    meta_lr: float | None = None
    """learning rate of Adam"""
    meta_weight_decay: float = 1e-4
    """weight decay of Adam"""
    beta: float = 0.5
    """weight of the matching loss"""
    inner_steps: int = 2
    """T, simulated steps on the matching loss"""
    scheme: Scheme = "transfer"
    """the paper's scheme, or ordinary bilevel `simulation`"""
    mode: Mode = "auto"
    """how an iteration runs: launch by launch, captured in a CUDA graph, or compiled and captured"""
    precision: Precision = "fp32"
    """arithmetic of the networks: fp32, tf32 on tensor cores, or bf16 with parameters in fp32"""
    memory: Memory = "save"
    """keep the activations of all simulated steps, or recompute them"""


@dataclass(frozen=True)
class TrainConfig:
    """One run: methods x seeds on one data set. What is left out takes the data set's own default."""

    name: str | None = None
    """name of the run; its folder is RUNS/NAME"""
    runs: Path = Path("runs")
    """where the folders of runs are"""
    resume: bool = False
    """go on with the run NAME, or with the latest one"""
    method: tuple[MethodName, ...] | None = None
    """methods to train, one or several"""
    seeds: tuple[int, ...] | None = None
    """random seeds, one training for each"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    data: DataConfig = field(default_factory=DataConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


# What `train` does by itself. Small images: the authors' settings (ResNet32 -> VGG9-bn, batch 128); folders: theirs for
# ResNet34 -> ResNet18 at 224. Digits: small networks, source classes 0-4, ten labelled images of each of 5-9.
_SMALL: dict[str, Any] = {
    "method": ("l2t-ww",),
    "seeds": (0,),
    "source": "resnet32",
    "target": "vgg9_bn",
    "source_width": 1.0,
    "target_width": 1.0,
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "meta_lr": 1e-4,
    "source_epochs": 40,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        **_SMALL,
        "method": ("scratch", "l2t-ww"),
        "seeds": (0, 1, 2),
        "source": "resnet8",
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
    "folder": {**_SMALL, "source": "resnet34", "target": "resnet18", "batch_size": 64},
}


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with what it leaves out filled in for its data set.

    Raises:
        L2TError: a number out of range, a method or seed given twice, settings that exclude each other.
    """
    source = config.source
    if source.source_weights is not None and (source.source_classes or source.source_epochs):
        raise L2TError("a source with --source-weights is not trained: leave out --source-classes and --source-epochs.")
    defaults = dict(_DEFAULTS.get(config.data.dataset, _SMALL))
    # Some defaults belong to another: the classes of the source to those of the target, a width to its network.
    if config.data.classes is not None:
        defaults.pop("source_classes", None)
    if config.source.source is not None:
        defaults["source_width"] = 1.0
    if config.target.target is not None:
        defaults["target_width"] = 1.0

    def fill(part: Any) -> Any:
        values = {
            f.name: defaults[f.name]
            for f in dataclasses.fields(part)
            if f.name in defaults and getattr(part, f.name) is None
        }
        return dataclasses.replace(part, **values)

    parts = {name: fill(getattr(config, name)) for name in ("data", "source", "target", "optim")}
    filled: TrainConfig = dataclasses.replace(fill(config), **parts)
    for name, value, least in (
        ("epochs", filled.optim.epochs, 1),
        ("source-epochs", filled.source.source_epochs, 1),
        ("batch-size", filled.optim.batch_size, 1),
        *(("seeds", seed, 0) for seed in filled.seeds or ()),
    ):
        if value is None or value < least:
            raise L2TError(f"--{name} {value} is too small: give at least {least}.")
    for name, values in (("method", filled.method or ()), ("seeds", filled.seeds or ())):
        if not values or len(set(values)) < len(values):
            raise L2TError(f"--{name} {' '.join(map(str, values))}: give at least one, and each once.")
    return filled


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes `config` as JSON."""
    save_text(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def load_config(path: Path) -> TrainConfig:
    """What `save_config` wrote.

    Raises:
        L2TError: the file is missing or is no such configuration.
    """
    try:
        values = json.loads(path.read_text())
        config: TrainConfig = _build(TrainConfig, values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise L2TError(
            f"{path} is not the configuration of a run: resume a folder that `l2t-fast train` made."
        ) from error
    return config


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """A configuration from JSON: lists become tuples, the paths paths, nested dictionaries their own class."""
    nested = {"data": DataConfig, "source": SourceConfig, "target": TargetConfig, "optim": OptimConfig}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if cls is TrainConfig and name in nested:
            arguments[name] = _build(nested[name], value)
        elif name in ("runs", "data_root"):
            arguments[name] = Path(value)
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)
