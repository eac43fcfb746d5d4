"""What the commands can be told, and what they do by themselves for each data set."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from l2t_fast.choices import DATASETS, LARGE, Memory, Mode, Precision, Scheme
from l2t_fast.data.options import DataConfig, DataOptions
from l2t_fast.errors import L2TError
from l2t_fast.files import save_text
from l2t_fast.methods import METHODS, find_method


@dataclass(frozen=True)
class SourceConfig:
    """The source networks, whose features are matched: one or several."""

    source: tuple[str, ...] | None = None
    """architecture of each: resnet32, vgg9_bn, or any classification network of torchvision"""
    source_weights: tuple[str, ...] | None = None
    """of each a checkpoint FILE (FILE:PREFIX if it holds several networks), or `imagenet` for torchvision's own"""
    source_width: tuple[float, ...] | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn: one number for all, or one for each"""
    source_layers: tuple[str, ...] | None = None
    """layers to match, named as in named_modules(); of several sources for each a list joined by commas"""
    source_classes: tuple[int, ...] | None = None
    """without weights: first train the sources on these classes of the data set"""
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
    where: Literal["relu6", "relu", "relu-avg", "softplus"] = "relu6"
    """pair weights of l2t-ww: rectified, of the pooled source feature (-avg: divided by its channels), or constants"""
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
    method: tuple[str, ...] | None = None
    """methods to train, one or several: scratch finetune lwf at lwf+at jacobian fm-single fm-one-to-one l2t-w-single
    l2t-w-one-to-one l2t-ww"""
    settings: tuple[str, ...] = ()
    """other than the published settings of a method, such as at.weight=500 or lwf.temperature=4"""
    seeds: tuple[int, ...] | None = None
    """random seeds, one training for each"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    data: DataConfig = field(default_factory=DataConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class TableConfig:
    """A table: methods x targets x seeds. A target is a data set, or one of several networks or sizes of it."""

    name: str | None = None
    """name of the table; its folder is RUNS/NAME. The same command again goes on with it"""
    runs: Path = Path("runs")
    """where the folders of runs are"""
    method: tuple[str, ...] = tuple(METHODS)
    """rows: methods"""
    settings: tuple[str, ...] = ()
    """other than the published settings of a method, such as at.weight=500 or lwf.temperature=4"""
    dataset: tuple[str, ...] = ("digits",)
    """columns: data sets"""
    target: tuple[str, ...] | None = None
    """architecture of the target; several of them are columns, too"""
    target_width: tuple[float, ...] | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn: one number for all, or one for each target"""
    target_layers: tuple[str, ...] | None = None
    """layers of the target to match, named as in named_modules()"""
    per_class: tuple[str, ...] | None = None
    """limited data, so many labelled training images of each class; several numbers (50,100,250) are columns, too"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """random seeds, one training for each"""
    jobs: int | None = None
    """trainings side by side; by default one a CPU core, and one on a GPU"""
    threads: int | None = None
    """CPU threads of each of them; by default the cores are divided among them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    data: DataOptions = field(default_factory=DataOptions)
    source: SourceConfig = field(default_factory=SourceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class PretrainConfig:
    """A source network, trained on a data set."""

    name: str | None = None
    """name of the run; its folder is RUNS/NAME, the checkpoint RUNS/NAME/source.pt"""
    runs: Path = Path("runs")
    """where the folders of runs are"""
    resume: bool = False
    """go on with the run NAME"""
    network: str | None = None
    """its architecture: resnet32 by default, vgg9_bn, or any classification network of torchvision"""
    width: float | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn"""
    seed: int | None = None
    """random seed, 0 by default"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


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
    **{name: _LARGE for name, size in DATASETS.items() if size == LARGE},
    "stanford40": {**_LARGE, "meta_lr": 1e-3},  # as the authors told (github.com/alinlab/L2T-ww/issues/4)
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
        defaults["source_width"] = (1.0,)
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
    parts["source"] = _of_each_source(parts["source"])
    filled: TrainConfig = dataclasses.replace(fill(config), **parts)
    for name, value, least in (
        ("epochs", filled.optim.epochs, 1),
        ("source-epochs", filled.source.source_epochs, 1),
        ("batch-size", filled.optim.batch_size, 1),
        *(("seeds", seed, 0) for seed in filled.seeds or ()),
    ):
        if value is None or value < least:
            raise L2TError(f"--{name} {value} is too small: give at least {least}.")
    check_once("method", filled.method or ())
    check_once("seeds", filled.seeds or ())
    methods = [find_method(name, config.settings) for name in filled.method or ()]
    used = {f"{name}.{keyword}" for method in methods for name, keyword, _ in method.settings}
    for setting in config.settings:
        if setting.partition("=")[0] not in used:
            raise L2TError(f"--settings {setting}: none of the methods given has that setting; leave it out.")
    return filled


def _of_each_source(source: SourceConfig) -> SourceConfig:
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


def check_once(flag: str, values: Sequence[Any]) -> None:
    """Raises L2TError where a value is missing, or given twice."""
    if not values or len(set(values)) < len(values):
        raise L2TError(f"--{flag} {' '.join(map(str, values))}: give at least one, and each once.")


def columns(table: TableConfig) -> dict[str, TrainConfig]:
    """The columns of a table, each a run of its own, by name: data sets x targets x images per class.

    Raises:
        L2TError: as `resolve`; numbers per class that are none; a column given twice.
    """
    for flag, values in (("dataset", table.dataset), ("target", table.target), ("method", table.method)):
        if values is not None:
            check_once(flag, values)
    sizes = _numbers(table.per_class) if table.per_class is not None else (None,)
    found: dict[str, TrainConfig] = {}
    targets: Sequence[str | None] = table.target or (None,)
    widths: Sequence[float | None] = table.target_width or (None,)
    widths = list(widths) * len(targets) if len(widths) == 1 else widths
    if len(widths) != len(targets):
        raise L2TError(f"--target-width has {len(widths)} values for {len(targets)} targets: give one for each.")
    for dataset, (target, width), size in itertools.product(table.dataset, zip(targets, widths, strict=True), sizes):
        data = DataConfig(**vars(table.data), dataset=dataset, per_class=size)
        network = TargetConfig(target, width, table.target_layers)
        config = resolve(
            TrainConfig(
                method=table.method,
                settings=table.settings,
                seeds=table.seeds,
                device=table.device,
                data=data,
                source=table.source,
                target=network,
                optim=table.optim,
            )
        )
        limit = [] if config.data.per_class is None else [str(config.data.per_class)]
        # Always in full: a table that gets more columns keeps the names of those it has.
        name = "-".join([dataset, str(config.target.target), *limit])
        found[name] = dataclasses.replace(config, name=name)
    return found


def _numbers(values: Sequence[str]) -> tuple[int, ...]:
    """Of "50,100" "250" the numbers 50, 100, 250."""
    try:
        numbers = tuple(int(part) for value in values for part in value.split(",") if part)
    except ValueError:
        raise L2TError(f"--per-class {' '.join(values)}: give numbers of images.") from None
    check_once("per-class", numbers)
    return numbers


# What a run may be given anew when it goes on: where data lie, and what computes.
ELSEWHERE = ("name", "runs", "resume", "device", "mode", "memory", "data_root", "workers", "download")


def check_same(given: Any, saved: Any, default: Any, what: str = "the run", free: Sequence[str] = ELSEWHERE) -> None:
    """Raises L2TError where `what` goes on with other settings than its own; `free` ones may differ.

    default: what counts as not given.
    """
    for f in dataclasses.fields(given):
        ours, theirs, usual = getattr(given, f.name), getattr(saved, f.name), getattr(default, f.name)
        if dataclasses.is_dataclass(ours):
            check_same(ours, theirs, usual, what, free)
        elif f.name not in free and ours not in (usual, theirs):
            flag = f.name.replace("_", "-")
            raise L2TError(
                f"{what} was made with --{flag} {_shown(theirs)}, not {_shown(ours)}: give the same settings again, or "
                "another --name."
            )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "nothing" if isinstance(value, tuple) else str(value)


def save_config(config: TrainConfig | TableConfig, path: Path) -> None:
    """Writes `config` as JSON."""
    save_text(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def load_config(path: Path) -> TrainConfig:
    """What `save_config` wrote of a run.

    Raises:
        L2TError: the file is missing or is no such configuration.
    """
    config: TrainConfig = _load(TrainConfig, path, "resume a folder that `l2t-fast train` made")
    return config


def load_table(path: Path) -> TableConfig:
    """What `save_config` wrote of a table.

    Raises:
        L2TError: the file is missing or is no such configuration.
    """
    config: TableConfig = _load(TableConfig, path, "give a folder that `l2t-fast table` made")
    return config


def _load(cls: Any, path: Path, advice: str) -> Any:
    try:
        return _build(cls, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise L2TError(f"{path} is not the configuration of a run: {advice}.") from error


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """A configuration from JSON: lists become tuples, the paths paths, nested dictionaries their own class.

    What a run of an older version does not say is as it is by default.
    """
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.name not in values:
            continue
        value = values.pop(f.name)
        if isinstance(value, dict):
            arguments[f.name] = _build(f.default_factory, value)
        elif f.name in ("runs", "data_root"):
            arguments[f.name] = Path(value)
        elif f.name in ("source", "source_weights", "source_width") and value is not None:
            arguments[f.name] = tuple(value) if isinstance(value, list) else (value,)
        else:
            arguments[f.name] = tuple(value) if isinstance(value, list) else value
    if values:
        raise KeyError(*values)
    return cls(**arguments)
