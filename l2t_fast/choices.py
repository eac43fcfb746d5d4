"""The words that settings are made of: what may be chosen, without what carries it out."""

from typing import Literal

Mode = Literal["auto", "eager", "graph", "compile"]
Precision = Literal["fp32", "tf32", "bf16"]
Tracker = Literal["tensorboard", "csv"]
Memory = Literal["save", "recompute"]
Scheme = Literal["transfer", "simulation"]
What = Literal["softmax", "uniform"]
Where = Literal["relu6", "relu6-inward", "relu", "relu-avg", "softplus", "fixed"]
Optimizer = Literal["sgd", "adamw"]
Export = Literal["safetensors", "torch-export", "onnx"]
PairRule = Literal["all-to-all", "one-to-one", "single"]

# Rows of the tables, in their order; those in LEARNING learn what or where to transfer, all others are baselines.
METHODS = (
    "scratch",
    "finetune",
    "lwf",
    "at",
    "lwf+at",
    "jacobian",
    "fm-single",
    "fm-one-to-one",
    "l2t-w-single",
    "l2t-w-one-to-one",
    "l2t-ww",
)
LEARNING = frozenset({"l2t-w-single", "l2t-w-one-to-one", "l2t-ww"})

# Data sets and the side of their images; those in RESIZED take another one.
SMALL, LARGE = 32, 224
DATASETS = {
    **dict.fromkeys(("digits", "fashion-mnist", "cifar10", "cifar100", "stl10", "tinyimagenet"), SMALL),
    **dict.fromkeys(("cub200", "mit67", "stanford40", "stanford-dogs", "folder"), LARGE),
    "npz": SMALL,  # in whatever size its file has; as for small images is what a run does by itself
}
RESIZED = ("folder", "npz")
