"""Small engines in float32 or float64 for the tests of modes, precisions and captures."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast import L2T, Engine
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers

CLASSES = 3


def batch(seed: int, size: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images [size, 3, 32, 32], each brighter or darker as a whole, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 32, 32, generator=generator) + torch.randn(size, 3, 1, 1, generator=generator)
    return x.to(device, dtype), torch.randint(CLASSES, (size,), generator=generator).to(device)


def learner(
    dtype: torch.dtype = torch.float64, device: str = "cpu", width: float = 0.06, dropout: nn.Module | None = None
) -> L2T:
    """ResNet8 -> a narrow VGG9-bn, 15 pairs, always with the same weights."""
    torch.manual_seed(0)
    source, target = build_model("resnet8", 5, 0.25), build_model("vgg9_bn", CLASSES, width)
    layers = {
        "source_layers": default_layers("resnet8", source),
        "target_layers": default_layers("vgg9_bn", target),
    }
    if dropout is not None:
        target.avgpool = nn.Sequential(nn.AdaptiveAvgPool2d(1), dropout)
    x = batch(0, 2, dtype, device)[0]
    return L2T(source.to(device, dtype), target.to(device, dtype), example=x, **layers)


def engine(of: L2T | None = None, **options: Any) -> Engine:
    """Of a new learner unless one is given; quiet unless told otherwise."""
    settings = {"lr": 0.02, "meta_lr": 1e-3, "say": lambda text: None, **options}
    return Engine(learner() if of is None else of, **settings)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def error(tensors: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative."""
    wanted = flat(exact).cpu()
    return ((flat(tensors).cpu() - wanted).norm() / wanted.norm()).item()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To the last bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def everything(of: Engine) -> dict[str, Tensor]:
    """Copies of all numbers that an iteration changes, in one dictionary."""
    state = copy.deepcopy(of.state_dict())
    tensors = {
        f"{group}.{name}": t for group in ("theta", "momentum", "buffers", "phi") for name, t in state[group].items()
    }
    moments = {
        f"adam.{i}.{name}": t for i, moment in state["adam"].get("state", {}).items() for name, t in moment.items()
    }
    return tensors | moments


def load_as(of: Engine, state: dict[str, Any]) -> None:
    """A state of other precision or of another device; Adam starts anew."""
    values = copy.deepcopy(state)
    dtype = next(iter(of.state_dict()["theta"].values())).dtype
    for group in ("theta", "momentum", "buffers", "phi"):
        values[group] = {n: t.to(dtype) if t.is_floating_point() else t for n, t in values[group].items()}
    of.load_state_dict({**values, "adam": of.state_dict()["adam"]})
