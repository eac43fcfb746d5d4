"""Narrow networks and the learners of every method on them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from l2t_fast import L2T
from l2t_fast.methods import find_method
from l2t_fast.networks.architectures import build_model
from tests.shared import CLASSES

SOURCES = {"resnet8": 5, "resnet14": 7}  # classes of each
LAYERS = {name: ["layer1", "layer2", "layer3"] for name in SOURCES}
TARGET_LAYERS = [f"features.{i}" for i in (2, 6, 13, 20, 27)]
ONE_TO_ONE = [(0, 0), (1, 1), (2, 2)]  # 32, 16 and 8 pixels


def networks(
    sources: Sequence[str] = ("resnet8",), dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    teachers = [build_model(name, SOURCES[name], 0.25).to(dtype).eval() for name in sources]
    for teacher in teachers:
        for norm in (m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
    target = build_model("vgg9_bn", CLASSES, 0.06).to(device, dtype)
    return [teacher.to(device) for teacher in teachers], target


def learner(name: str, sources: Sequence[str] = ("resnet8",), settings: Sequence[str] = (), **options: Any) -> L2T:
    method, (teachers, target) = find_method(name, settings), networks(sources, **options)
    if not method.uses_sources:
        teachers = []
    return method.learner(
        teachers,
        target,
        source_layers=[LAYERS[s] for s in sources] if teachers else [],
        target_layers=TARGET_LAYERS,
        example=torch.zeros(2, 3, 32, 32).to(next(target.parameters())),
    )
