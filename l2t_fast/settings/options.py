"""What the commands can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from l2t_fast.choices import METHODS, Export, Memory, Mode, Optimizer, Precision, Scheme, Tracker
from l2t_fast.data.options import DataConfig, DataOptions


@dataclass(frozen=True)
class SourceConfig:
    """The source networks, whose features are matched: one or several.

    By default resnet8 for digits, trained first; resnet32 for other small images and resnet34 for those of 224 x 224,
    which need weights or classes to train on. Their layers are by default the stages of a ResNet and, of a VGG, what
    enters each max-pool.
    """

    source: tuple[str, ...] | None = None
    """architecture of each: resnet32, vgg9_bn, any classification network of torchvision (NAME or torchvision/NAME) or
    of timm (timm/NAME), or MODULE:FUNCTION, which returns one"""
    source_weights: tuple[str, ...] | None = None
    """of each a checkpoint FILE (FILE:PREFIX if it holds several networks), `imagenet` for torchvision's own,
    `pretrained` or `hf-hub:ORG/NAME` for timm's, or `own` for those that MODULE:FUNCTION gives it"""
    source_width: tuple[float, ...] | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn: one number for all, or one for each"""
    source_layers: tuple[str, ...] | None = None
    """layers to match, named as in named_modules(); of several sources for each a list joined by commas. By default
    the last of each resolution (`l2t-fast inspect NETWORK` shows them)"""
    source_classes: tuple[int, ...] | None = None
    """without weights: first train the sources on these classes of the data set"""
    source_epochs: int | None = None
    """epochs of that training, by default 40 (digits: 10)"""


@dataclass(frozen=True)
class TargetConfig:
    """The target network, which is trained.

    By default vgg9_bn, for images of 224 x 224 resnet18; a quarter as wide for digits.
    """

    target: str | None = None
    """its architecture: vgg9_bn, resnet32, any classification network of torchvision or of timm (timm/NAME), or
    MODULE:FUNCTION"""
    target_width: float | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn"""
    target_layers: tuple[str, ...] | None = None
    """layers to match, named as in named_modules(); by default the last of each resolution"""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """An iteration: each field is an argument of `Engine`."""

    lr: float | None = None
    """learning rate of SGD at the start, by default 0.1 (digits: 0.03); of AdamW 0.001"""
    momentum: float = 0.9
    """momentum of SGD, from 0 to 1"""
    weight_decay: float | None = None
    """weight decay, of SGD by default 0.0001; of AdamW, where it is decoupled from the gradient, 0.01"""
    nesterov: bool = False
    """Nesterov's form of momentum"""
    max_grad_norm: float | None = None
    """clip the gradient of each real and simulated step to this global norm, by default not"""
    meta_lr: float | None = None
    """learning rate of Adam, by default 0.0001 (digits and stanford40: 0.001)"""
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
    accumulate: int = 1
    """K: divide each batch into K micro-batches, and hold the activations of one at a time"""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(EngineOptions):
    """The iteration: SGD or AdamW on the target, Adam on the meta-networks, cosine annealing over the epochs."""

    optimizer: Optimizer = "sgd"
    """of the target, in real and simulated steps: SGD with momentum, or AdamW (betas 0.9 and 0.999, which has no
    --momentum)"""
    label_smoothing: float = 0.0
    """share of a label that all classes get alike, from 0 to 1, in each cross entropy of a training"""
    epochs: int | None = None
    """passes over the training images, by default 200 (digits: 30)"""
    batch_size: int | None = None
    """images in a batch, by default 128 (digits: 25; of 224 x 224: 64)"""
    where: Literal["relu6", "relu6-inward", "relu", "relu-avg", "softplus"] = "relu6"
    """pair weights of l2t-ww: rectified, of the pooled source feature (-avg: divided by its channels; -inward: with a
    way back from 0 and 6, where relu6 has no gradient), or constants"""


@dataclass(frozen=True)
class TrainConfig:
    """One run: methods x seeds on one data set. What is left out takes the data set's own default."""

    name: str | None = None
    """name of the run; its folder is RUNS/NAME; by default the data set and the time"""
    runs: Path = Path("runs")
    """where the folders of runs are"""
    resume: bool = False
    """go on with the run NAME, or with the latest one"""
    method: tuple[str, ...] | None = None
    """methods to train, one or several: scratch finetune lwf at lwf+at jacobian fm-single fm-one-to-one l2t-w-single
    l2t-w-one-to-one l2t-ww; by default l2t-ww (digits: scratch l2t-ww)"""
    settings: tuple[str, ...] = ()
    """other than the published settings of a method, such as at.weight=500 or lwf.temperature=4; and lr, beta or
    meta_lr of one method alone, such as l2t-ww.beta=0.1"""
    seeds: tuple[int, ...] | None = None
    """random seeds, one training for each, by default 0 (digits: 0 1 2)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    export: tuple[Export, ...] = ()
    """also write the trained target, its weights that are best by validation, in these formats, one or several:
    target.safetensors, target.pt2 (torch.export), target.onnx"""
    log: tuple[Tracker, ...] = ()
    """also write TensorBoard event files, or CSV files, beside each metrics.jsonl"""
    quiet: bool = False
    """print errors alone"""
    data: DataConfig = field(default_factory=DataConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class TableConfig:
    """A table: methods x targets x seeds. A target is a data set, or one of several networks or sizes of it."""

    name: str | None = None
    """name of the table, by default table-DATASET; its folder is RUNS/NAME. The same command again goes on with it"""
    runs: Path = Path("runs")
    """where the folders of runs are"""
    method: tuple[str, ...] = METHODS
    """rows: methods"""
    settings: tuple[str, ...] = ()
    """other than the published settings of a method, such as at.weight=500 or lwf.temperature=4; and lr, beta or
    meta_lr of one method alone, such as l2t-ww.beta=0.1"""
    dataset: tuple[str, ...] = ("digits",)
    """columns: data sets"""
    target: tuple[str, ...] | None = None
    """architecture of the target, by default as for `train`; several of them are columns, too"""
    target_width: tuple[float, ...] | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn: one number for all, or one for each target; by default 1
    (digits: 0.25)"""
    target_layers: tuple[str, ...] | None = None
    """layers of the target to match, named as in named_modules(); by default as for `train`"""
    per_class: tuple[str, ...] | None = None
    """limited data, so many labelled training images of each class; several numbers (50,100,250) are columns, too;
    by default all (digits: 10)"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """random seeds, one training for each"""
    jobs: int | None = None
    """trainings side by side; by default one a CPU core, or as many as the GPUs take, or as the scheduler lets run"""
    threads: int | None = None
    """CPU threads of each of them; by default the cores are divided among them, on other machines 1"""
    launcher: Literal["local", "ray", "submitit"] = "local"
    """where trainings run: processes here, a Ray cluster, Slurm by submitit; the last two want a shared file system"""
    gpus_per_cell: float | None = None
    """share of a GPU that a training takes, 1 by default: with 0.25 four share one"""
    replicas: int = 1
    """trainings of a column that take turns in one process; on a GPU each on a stream of its own"""
    submitit: tuple[str, ...] = ()
    """options of submitit, each NAME=VALUE: slurm_partition=gpu timeout_min=600 mem_gb=16; cluster=local: no Slurm"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    export: tuple[Export, ...] = ()
    """also write the trained target of each cell, into its folder, as `train` does; of cells that are done, too"""
    log: tuple[Tracker, ...] = ()
    """also write TensorBoard event files, or CSV files, beside each metrics.jsonl"""
    quiet: bool = False
    """print errors alone"""
    data: DataOptions = field(default_factory=DataOptions)
    source: SourceConfig = field(default_factory=SourceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


# What `pretrain` calls otherwise than the saved settings, by their names there.
PRETRAIN_NAMES = {"target": "network", "target_width": "width", "seeds": "seed"}


@dataclass(frozen=True)
class PretrainConfig:
    """A source network, trained on a data set."""

    name: str | None = None
    """name of the run, by default pretrain-DATASET-NETWORK; its folder is RUNS/NAME, the checkpoint
    RUNS/NAME/source.pt"""
    runs: Path = Path("runs")
    """where the folders of runs are"""
    resume: bool = False
    """go on with the run NAME"""
    network: str | None = None
    """its architecture: resnet32 by default, vgg9_bn, any classification network of torchvision or of timm (timm/NAME),
    or MODULE:FUNCTION"""
    width: float | None = None
    """multiplies the channels of resnet20/32/.. and vgg9_bn, by default by 1"""
    seed: int | None = None
    """random seed, 0 by default"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    log: tuple[Tracker, ...] = ()
    """also write TensorBoard event files, or CSV files, beside each metrics.jsonl"""
    quiet: bool = False
    """print errors alone"""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
