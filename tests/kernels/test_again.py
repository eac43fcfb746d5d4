"""Tensors that come twice (`autograd.mark_again`): two summands are read where they are due; nobody notices."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from l2t_fast.kernels.layers.twins import Twins
from tests.kernels.interpreted import on_triton
from tests.kernels.shared import Reversal
from tests.kernels.test_pending import DEVICE, Double, compare

pytestmark = pytest.mark.core

Use = Callable[["Chain", Tensor], Tensor]


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return on_triton(monkeypatch)


class Chain(nn.Module):
    """Images [B, 3, 5, 4]; use(chain, r) of what a first convolution, BatchNorm and ReLU give [B, 4, 5, 4]."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = use
        self.c, self.n = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.d, self.e = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.m = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.m(self.use(self, F.relu(self.n(self.c(x))))))


def hooked_before(chain: Chain, r: Tensor) -> Tensor:
    r.register_hook(lambda g: 3 * g)
    return chain.d(r)


def hooked_after(chain: Chain, r: Tensor) -> Tensor:
    z = chain.d(r)
    r.register_hook(lambda g: 3 * g)
    return z


def hooked_gradient(chain: Chain, r: Tensor) -> Tensor:
    z = chain.d(r)
    z.register_hook(lambda g: g.sin())
    return z


def watched_gradient(chain: Chain, r: Tensor) -> Tensor:
    z = chain.d(r)
    z.register_hook(lambda g: None)
    return z


def hooked_in_a_hook(chain: Chain, r: Tensor) -> Tensor:
    """On the gradient itself: what is due as that is changed."""
    z = chain.d(r)

    def hook(g: Tensor) -> None:
        if g.requires_grad:
            g.register_hook(lambda u: 2 * u)

    z.register_hook(hook)
    return z


USES: dict[str, Use] = {
    "a convolution": lambda chain, r: chain.d(r),
    "two convolutions": lambda chain, r: chain.d(r) + chain.e(r),
    "a shortcut": lambda chain, r: chain.d(r) + r,
    "the same twice": lambda chain, r: chain.d(chain.d(r)),
    "detached": lambda chain, r: chain.d(r.detach()) + r,
    "a Function": lambda chain, r: chain.d(r) + Double.apply(r),
    "a Function that reverses": lambda chain, r: chain.d(Reversal.apply(r)),
    "a Function on the gradient": lambda chain, r: Reversal.apply(chain.d(r)),
    "a hook before": hooked_before,
    "a hook after": hooked_after,
    "a hook on the gradient": hooked_gradient,
    "a hook that watches the gradient": watched_gradient,
    "a hook on what a hook gets": hooked_in_a_hook,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_the_same_in_all_three_orders(use: Use) -> None:
    compare(Chain(use))


class Sums(TorchDispatchMode):
    """Counts sums of features."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sums = func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_)
        self.count += sums and args[0].dim() == 4 and args[0].shape[0] == 2
        return func(*args, **(kwargs or {}))


def test_no_sum_of_cotangents_in_front_of_a_convolution() -> None:
    """Neither of the two convolutions in the adjoint, nor of what the second reads, nor of γ."""
    torch.manual_seed(0)
    network = Chain(lambda chain, r: chain.d(r)).double().to(DEVICE)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, device=DEVICE)
    with Twins(network).taken(simulated=True):
        loss = network(x).sin().sum()
    variables = [p for name, p in network.named_parameters() if not name.startswith("e.")]
    g = torch.autograd.grad(loss, variables, create_graph=True)
    second = sum(t.square().sum() for t in g)
    with Sums() as sums:
        torch.autograd.grad(second, variables, allow_unused=True)
    assert sums.count == 0
