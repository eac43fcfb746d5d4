"""Tiny networks, engines beside the oracle in one state, and comparisons, for the tests of the engine."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from l2t_fast import L2T, Engine
from l2t_fast.engine import bilevel
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.reference import Reference

CLASSES, BATCH = 3, 4
Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]


def small_batch(seed: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


X, Y = small_batch(0, 8)


def block(c_in: int, c_out: int, stride: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), act)


def source_net(strides: tuple[int, int], channels: tuple[int, int] = (5, 6)) -> nn.Module:
    first, second = channels
    return nn.Sequential(block(3, first, strides[0], nn.ReLU()), block(first, second, strides[1], nn.ReLU())).double()


def small_net(act: nn.Module | None = None, middle: nn.Module | None = None) -> nn.Module:
    """Images [B, 3, 8, 8] or larger; layers "0" (half as high and wide) and "2" (a quarter)."""
    act = nn.ReLU(inplace=True) if act is None else act
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
    return nn.Sequential(block(3, 5, 2, act), middle or nn.Identity(), block(5, 4, 2, act), *head).double()


def small_learner(target: nn.Module | None = None, **options: Any) -> L2T:
    """One source of 4x4 and 2x2 features, a target of 4x4 and 2x2, 8x8 images."""
    torch.manual_seed(0)
    options = {"source_layers": ["0", "1"], "target_layers": ["0", "2"], **options}
    learner = L2T(source_net((2, 2)), target or small_net(), example=small_batch(0, 8)[0], **options)
    randomise(learner)
    return learner


def randomise(learner: L2T) -> None:
    """φ away from its start; some pair weights λ clipped from above or below."""
    with torch.no_grad():
        for p in (*learner.what.parameters(), *learner.where.parameters()):
            p.add_(0.3 * torch.randn_like(p))
        for head, level in zip(learner.where, (6.0, 0.0), strict=False):
            if isinstance(head, nn.Linear):
                head.bias.fill_(level)


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_close(actual: Tensors, expected: Tensors, relative: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    difference, size = (flat(actual) - flat(expected)).norm(), flat(expected).norm()
    assert difference <= relative * size, f"relative difference {difference / size:.1e}"


def snapshot(engine: Engine) -> dict[str, Any]:
    """Copies of all that an iteration might change."""
    learner = engine.learner
    state = engine.state_dict()
    return copy.deepcopy(
        {
            "parameters": dict(learner.named_parameters()),
            "grad": {name: p.grad for name, p in learner.named_parameters()},
            "buffers": dict(learner.named_buffers()),
            "training": [m.training for m in learner.modules()],
            "requires_grad": [p.requires_grad for p in learner.parameters()],
            "random": torch.get_rng_state(),
            "momentum": state["momentum"],
            "adam": state["adam"],
            "lr": engine.lr,
        }
    )


def assert_identical(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


RULE = {"lr", "momentum", "weight_decay", "nesterov"}
ENGINE = RULE | {"meta_lr", "meta_weight_decay", "beta", "inner_steps", "scheme", "loss"}


def beside_the_reference(
    target: nn.Module,
    target_layers: Sequence[str],
    *,
    two_sources: bool = True,
    size: int,
    memory: bilevel.Memory = "save",
    warm: int = 3,
    **options: Any,
) -> tuple[Engine, Reference]:
    """An engine and the oracle, in the same state, `warm` iterations after initialisation, with random φ.

    The first source has features a half and a quarter as high and wide as the image, the second 1 and an eighth.
    """
    torch.manual_seed(0)
    sources = [source_net((2, 2)), source_net((1, 8), (4, 3))][: 1 + two_sources]
    settings = {"lr": 0.05, "weight_decay": 1e-2, **{k: v for k, v in options.items() if k in ENGINE}}
    networks = {
        "source_layers": [["0", "1"]] * len(sources),
        "target_layers": target_layers,
        "example": small_batch(0, size)[0],
        **{k: v for k, v in options.items() if k not in ENGINE},
    }
    learner = L2T(sources, copy.deepcopy(target), **networks)
    randomise(learner)
    engine = Engine(learner, **settings, memory=memory)
    for seed in range(warm):
        engine.step(*small_batch(seed, size), val=small_batch(9, size))
    reference = Reference(copy.deepcopy(sources), target, **{**networks, "pairs": learner.pairs}, **settings)
    take_state(reference, copy.deepcopy(engine.state_dict()))
    return engine, reference


@torch.no_grad()
def take_state(reference: Reference, state: dict[str, Any]) -> None:
    for ours, theirs in ((reference.theta, state["theta"]), (reference.phi, state["phi"])):
        assert ours.keys() == theirs.keys()
        for name, p in ours.items():
            p.copy_(theirs[name])
    for name, buffer in reference.target.named_buffers():
        buffer.copy_(state["buffers"][name])
    for name, p in reference.theta.items():
        reference.optimizer.state[p]["momentum_buffer"] = state["momentum"][name]
    if reference.meta_optimizer is not None:
        reference.meta_optimizer.load_state_dict(state["adam"])


def resnet() -> tuple[nn.Module, list[str]]:
    """Features as high and wide as the image, a half and a quarter of that."""
    model = build_model("resnet8", CLASSES, width=0.25).double()
    return model, default_layers("resnet8", model)


def vgg() -> tuple[nn.Module, list[str]]:
    """Features of 32x32, 16x16, 8x8, 4x4 and 2x2."""
    model = build_model("vgg9_bn", CLASSES, width=0.06).double()
    return model, default_layers("vgg9_bn", model)


def frozen() -> tuple[nn.Module, list[str]]:
    model, layers = resnet()
    model.get_submodule("conv1").requires_grad_(False)
    model.get_submodule("layer2.0.bn1").requires_grad_(False)
    return model, layers


class Summed(nn.Module):
    """A convolution with the sum of two parameters, whose gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(0.2 * torch.randn(5, 5, 3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a + self.b, padding=1)


def with_a_sum() -> tuple[nn.Module, list[str]]:
    return small_net(middle=Summed()), ["0", "2"]


def with_dropout() -> tuple[nn.Module, list[str]]:
    return small_net(middle=nn.Dropout(0.3)), ["0", "2"]


def case_id(case: Any) -> str:
    return case.__name__ if callable(case) else "-".join(f"{k}={v}" for k, v in case.items())


def flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
