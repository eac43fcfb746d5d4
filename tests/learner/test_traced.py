"""Graphs for compilers: equal to the module's own pass, or refused."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.learner.network import Network
from l2t_fast.learner.traced import trace
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers

pytestmark = pytest.mark.core

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Middle(nn.Module):
    """A module with a convolution c, a parameter g that starts at zero and a buffer m, and any forward pass."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.g = nn.Parameter(torch.zeros(()))
        self.register_buffer("m", torch.zeros(4))
        self.count = 0
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def net(run: Callable[[Any, Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Middle(run), *head).double()


def traced(module: nn.Module) -> Any:
    return trace(Network(module, ["0"], X, role="target", output=True), X)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return -g[0]


def lost_product(mid: Any, x: Tensor) -> Tensor:
    b = mid.c(x) * mid.g
    b.mul_(3.0)
    return x + b


def lost_buffer(mid: Any, x: Tensor) -> Tensor:
    mid.m.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
    return x - mid.m[:, None, None]


def replaced_buffer(mid: Any, x: Tensor) -> Tensor:
    mid.m = 0.9 * mid.m + 0.1 * x.detach().mean((0, 2, 3))
    return x - mid.m[:, None, None]


def lost_context(mid: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return mid.c(x)


def pythons_coin(mid: Any, x: Tensor) -> Tensor:
    return x if mid.training and random.random() < 0.1 else x + mid.c(x)


def torchs_coin(mid: Any, x: Tensor) -> Tensor:
    return x if mid.training and torch.rand(()).item() < 0.1 else x + mid.c(x)


def torchs_draw(mid: Any, x: Tensor) -> Tensor:
    return x + mid.c(x) * torch.rand(4, 1, 1).double()


LOST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "product": lost_product,
    "buffer": lost_buffer,
    "replaced buffer": replaced_buffer,
    "no_grad": lost_context,
    "own backward": lambda mid, x: Reversed.apply(mid.c(x)),
    "python's coin": pythons_coin,
    "torch's coin": torchs_coin,
    "torch's draw": torchs_draw,
    "condition on values": lambda mid, x: x if x.sum() > 0 else mid.c(x),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_graph_would_lose_is_refused(name: str) -> None:
    module = net(LOST[name])
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(L2TError, match=r"the target \(Sequential\) cannot be compiled: .*; use mode='graph' or"):
        traced(module)
    for n, t in module.state_dict().items():
        assert torch.equal(t, before[n]), n


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_refused(kind: str) -> None:
    module = net(lambda mid, x: mid.c(x))
    getattr(module[2], f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(L2TError, match=r"cannot be compiled: it has hooks"):
        traced(module)


def test_hooks_of_parameters_are_refused() -> None:
    module = net(lambda mid, x: mid.c(x))
    module[0].weight.register_hook(torch.zeros_like)
    with pytest.raises(L2TError, match=r"cannot be compiled: it has hooks"):
        traced(module)


def test_a_frozen_batchnorm_is_followed() -> None:
    module = net(lambda mid, x: x + mid.c(x) * mid.g)
    module[1].eval()
    module[1].running_mean.fill_(0.3)
    network = Network(module, ["0"], X, role="target", output=True)
    graph = trace(network, X)
    (ours, theirs) = (runs.run(X) for runs in (graph, network))
    assert torch.allclose(ours.logits, theirs.logits, rtol=1e-12, atol=0)  # type: ignore[arg-type]
    assert not module[1].training
    assert torch.equal(module[1].running_mean, torch.full((4,), 0.3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["resnet8", "vgg9_bn", "resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_ordinary_networks_are_traced(name: str) -> None:
    torch.manual_seed(0)
    module = build_model(name, 3, 0.25 if name in ("resnet8", "vgg9_bn") else 1.0).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    layers = default_layers(name, module) if name in ("resnet8", "vgg9_bn", "resnet18") else ["features.2"]
    network = Network(module, layers, x, role="target", output=True)
    graph = trace(network, x)
    state = {n: b.clone() for n, b in module.named_buffers()}
    torch.manual_seed(1)
    ours = graph.run(x, {}, {n: b.clone() for n, b in state.items()})
    torch.manual_seed(1)
    theirs = network.run(x, {}, {n: b.clone() for n, b in state.items()})
    for one, other in zip([ours.logits, *ours.features], [theirs.logits, *theirs.features], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]
