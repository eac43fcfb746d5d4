"""BatchNorms that wait for a sum and a ReLU: whatever is done with what they return, the same as in PyTorch."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.kernels.layers.batch_norm import BatchNorm
from l2t_fast.kernels.layers.pending import Pending
from l2t_fast.kernels.layers.twins import Twins
from tests.kernels.interpreted import on_triton

pytestmark = pytest.mark.core

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Use = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return on_triton(monkeypatch)


class Double(torch.autograd.Function):
    """A user's own, which reaches tensors below everything that looks at torch's functions."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 2 * g * y


class Layer(nn.Module):
    """Images [B, 3, 5, 4]; use(y, s) of a BatchNorm's y and a shortcut s, both [B, 4, 5, 4]."""

    def __init__(self, use: Use, shortcut_norm: bool = False, **norm: Any) -> None:
        super().__init__()
        self.use = use
        self.c, self.n = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **norm)
        self.s, self.m = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4) if shortcut_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.n(self.c(x)), self.m(self.s(x)))


def inplace(y: Tensor, s: Tensor) -> Tensor:
    y += s
    F.relu_(y)
    return y


def other_name(y: Tensor, s: Tensor) -> Tensor:
    """The name before the operation in place shows what that made."""
    z = y
    y.add_(s)
    r = torch.relu(y)
    return r + z


def shortcut_overwritten(y: Tensor, s: Tensor) -> Tensor:
    s = s * 1.0
    s += y
    return F.relu(s)


def view(y: Tensor, s: Tensor) -> Tensor:
    part = y[:, 1:3]
    part.mul_(2.0)
    return F.relu(y) + s


def scaled(y: Tensor, s: Tensor) -> Tensor:
    y.mul_(s)
    return F.relu(y)


def without_graph(y: Tensor, s: Tensor) -> Tensor:
    with torch.no_grad():
        size = y.abs().mean()
        shown = F.relu(y).sum()
    return F.relu(y) * size + s * shown


def function_and_relu(y: Tensor, s: Tensor) -> Tensor:
    return F.relu(y) + Double.apply(y) * s


def sum_and_function(y: Tensor, s: Tensor) -> Tensor:
    z = y
    y += s
    y = F.relu_(y)
    return y + Double.apply(z)


def both_ways(y: Tensor, s: Tensor) -> Tensor:
    r = F.relu(y)
    return r + torch.sigmoid(y) * s


# What is done, and how many of the BatchNorms' results are computed, each time with what follows.
USES: dict[str, tuple[Use, int]] = {
    "relu": (lambda y, s: F.relu(y) + s, 1),
    "relu in place": (lambda y, s: F.relu(y, inplace=True) * s, 1),
    "method": (lambda y, s: y.relu().mul(s), 1),
    "module": (lambda y, s: nn.ReLU(inplace=True)(y) + s, 1),
    "sum": (lambda y, s: F.relu(y + s), 1),
    "sum, the other way": (lambda y, s: torch.relu(s + y), 1),
    "sum in place": (inplace, 1),
    "torch.add": (lambda y, s: F.relu(torch.add(y, s)), 1),
    "with alpha": (lambda y, s: F.relu(torch.add(y, s, alpha=2)), 1),
    "sum alone": (lambda y, s: (y + s).sin(), 1),
    "number": (lambda y, s: F.relu(y + 0.1) * s, 1),
    "broadcast": (lambda y, s: F.relu(y + s[:1]), 1),
    "three summands": (lambda y, s: F.relu(y + s + s), 1),
    "twice itself": (lambda y, s: F.relu(y + y) * s, 1),
    "relu6": (lambda y, s: F.relu6(y) * s, 1),
    "sigmoid": (lambda y, s: torch.sigmoid(y) * s, 1),
    "another name": (other_name, 2),
    "the shortcut overwritten": (shortcut_overwritten, 1),
    "a view overwritten": (view, 1),
    "overwritten": (scaled, 1),
    "read without a graph": (without_graph, 1),
    "two readers": (both_ways, 2),
    "a Function": (lambda y, s: Double.apply(y) + s, 1),
    "a Function and relu": (function_and_relu, 2),
    "detached": (lambda y, s: F.relu(y) + y.detach() * s, 2),
    "a list": (lambda y, s: torch.cat([y, s], 1).relu(), 1),
    "overwritten and a Function": (lambda y, s: Double.apply(y.mul_(2.0)) + Double.apply(y), 1),
    "relu in place and a Function": (lambda y, s: F.relu_(y) * s + Double.apply(y), 1),
    "sum in place and a Function": (sum_and_function, 1),
    "nothing": (lambda y, s: s.sin(), 0),
}


def three_orders(network: nn.Module, x: Tensor, own: bool) -> list[Tensor]:
    """Value, gradient and a derivative of the gradient, with respect to all parameters and x; running statistics."""
    variables = [x.detach().requires_grad_(), *network.parameters()]
    if own:
        with Twins(network).taken(simulated=False):
            y = network(variables[0])
    else:
        y = network(variables[0])
    g = torch.autograd.grad(y.sin().sum(), variables, create_graph=True, allow_unused=True)
    first = [torch.zeros_like(v) if t is None else t for v, t in zip(variables, g, strict=True)]
    loss = sum((t.sin() + t).sum() for t in first if t.requires_grad)
    second = torch.autograd.grad(loss, variables, allow_unused=True)
    second = [torch.zeros_like(v) if t is None else t for v, t in zip(variables, second, strict=True)]
    return [y, *first, *second, *(b for b in network.buffers() if b.is_floating_point())]


def compare(network: nn.Module) -> None:
    torch.manual_seed(0)
    network = network.double().to(DEVICE)
    for p in network.parameters():
        nn.init.normal_(p, 0.1, 0.5)
    plain, x = copy.deepcopy(network), torch.randn(2, 3, 5, 4, dtype=torch.float64, device=DEVICE)
    found, wanted = three_orders(network, x, True), three_orders(plain, x, False)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        assert type(ours) is Tensor or ours.__class__ is Pending


@pytest.mark.parametrize(("use", "computed"), USES.values(), ids=USES)
def test_the_same_in_all_three_orders(use: Use, computed: int, launched: Counter[str]) -> None:
    compare(Layer(use))
    assert launched["normalise"] == computed


@pytest.mark.parametrize(("use", "computed"), USES.values(), ids=USES)
def test_the_same_in_evaluation_mode(use: Use, computed: int, launched: Counter[str]) -> None:
    """Where gradients are off, as in a source: one pass over memory, by the running statistics, which stay."""
    torch.manual_seed(0)
    network = Layer(use, eps=1e-2).double().to(DEVICE).eval()
    for t in (network.n.running_mean, network.n.running_var, *network.parameters()):
        t.data.uniform_(0.2, 2.0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        wanted = network(x)
        with Twins(network).taken(simulated=False):
            found = network(x)
        torch.testing.assert_close(found + 0, wanted, rtol=1e-12, atol=1e-12)
    assert launched == ({"normalise": computed} if computed else {})


def test_evaluation_mode_in_inference_mode_and_with_hooks(launched: Counter[str]) -> None:
    """Nothing waits: what is written is not counted there, and a hook sees what PyTorch's BatchNorm gives."""
    network = Layer(lambda y, s: F.relu(y) + s).double().to(DEVICE).eval()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, device=DEVICE)
    with torch.inference_mode(), Twins(network).taken(simulated=False):
        found = network(x)
    seen: list[Tensor] = []
    network.n.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad(), Twins(network).taken(simulated=False):
        torch.testing.assert_close(network(x), found)
    assert type(seen[0]) is Tensor
    assert not launched


def test_running_statistics_overwritten_in_between(launched: Counter[str]) -> None:
    def use(y: Tensor, s: Tensor) -> Tensor:
        network.n.running_var.mul_(2.0)
        return F.relu(y)

    network = Layer(use).double().to(DEVICE).eval()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, device=DEVICE)
    with torch.no_grad(), Twins(network).taken(simulated=False), pytest.raises(L2TError, match="overwritten in place"):
        network(x)


@pytest.mark.parametrize("momentum", [0.3, 0.0, None])
def test_running_statistics(momentum: float | None, launched: Counter[str]) -> None:
    """Those of a pass, and the number of batches, in one launch; of several passes."""
    ours = nn.BatchNorm2d(20, eps=1e-2, momentum=momentum).double().to(DEVICE)
    theirs, x = copy.deepcopy(ours), torch.randn(3, 20, 2, 3, dtype=torch.float64, device=DEVICE)
    versions = [b._version for b in ours.buffers()]
    for scale in (1.0, 3.0):
        theirs(scale * x)
        with Twins(ours).taken(simulated=False):
            ours(scale * x)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert all(b._version > before for b, before in zip(ours.buffers(), versions, strict=True))
    assert launched["running"] == (0 if momentum is None else 2)


@pytest.mark.parametrize("name", ["sum", "sum in place", "sum, the other way", "two readers", "twice itself"])
def test_a_shortcut_with_a_norm(name: str, launched: Counter[str]) -> None:
    compare(Layer(USES[name][0], shortcut_norm=True))


def test_relu_and_sum_are_part_of_the_launches(launched: Counter[str]) -> None:
    """A BatchNorm with what follows is one launch forward (after its statistics), three for each gradient."""
    compare(Layer(inplace))
    # The gradient, its adjoint, and in the same sweep the gradient once more, which takes in what the adjoint left.
    assert launched == {"normalise": 1, "sums": 3, "coefficients": 3, "combine": 3, "running": 1}


def test_modes_and_hooks(launched: Counter[str]) -> None:
    """In evaluation mode, and with hooks on the BatchNorm, nothing waits."""
    network = Layer(inplace)
    network.n.eval()
    compare(network)
    assert not launched
    for register in ("register_forward_hook", "register_full_backward_hook"):
        launched.clear()
        network, seen = Layer(lambda y, s: F.relu(y) + s), []
        getattr(network.n, register)(lambda module, *tensors, seen=seen: seen.append(tensors[-1]))
        compare(network)
        assert not any(isinstance(t, Pending) for t in seen)
        assert launched["normalise"] == 1
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    seen = []
    network[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().sum().item()))
    network[2].register_full_backward_hook(lambda module, given, got: seen.append(got[0].abs().sum().item()))
    compare(network)
    assert len(seen) == 6  # the gradient passes backward hooks, and so does its derivative
    half = len(seen) // 2
    assert seen[:half] == pytest.approx(seen[half:], rel=1e-10)


def test_what_is_known_without_values(launched: Counter[str]) -> None:
    seen: list[Any] = []

    def use(y: Tensor, s: Tensor) -> Tensor:
        seen.append(
            (y.shape, y.size(0), y.dim(), y.dtype, y.device.type, y.requires_grad, len(y), y.is_floating_point())
        )
        return F.relu(y) + s

    compare(Layer(use))
    assert seen[0] == seen[1]
    assert launched["normalise"] == 1


def overwrites_the_shortcut(y: Tensor, s: Tensor) -> Tensor:
    s = s.detach().clone()
    y = y + s
    s.zero_()
    return F.relu(y)


def view_overwritten_for_a_function(y: Tensor, s: Tensor) -> Tensor:
    y[:, 1:].mul_(2.0)
    return Double.apply(y) + s


@pytest.mark.parametrize("use", [overwrites_the_shortcut, view_overwritten_for_a_function])
def test_what_cannot_be_had_is_refused(use: Use, launched: Counter[str]) -> None:
    """Never silently wrong: the values are gone, or the graph behind a name does not show what overwrote it."""
    network = Layer(use).double().to(DEVICE)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, device=DEVICE)
    with Twins(network).taken(simulated=True), pytest.raises(L2TError, match="overwritten in place"):
        network(x)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("summand", [True, False])
@pytest.mark.parametrize("triton", [pytest.param(True, marks=pytest.mark.slow), False])
def test_gradcheck(relu: bool, summand: bool, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the operator itself, in Triton and in ATen."""
    if triton:
        on_triton(monkeypatch)
    torch.manual_seed(0)
    x = (3 + torch.randn(2, 1, 1, 2, dtype=torch.float64, device=DEVICE)).requires_grad_()
    gamma, beta = (torch.ones(1, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    addend = torch.full((2, 1, 1, 2), 0.1, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def normalise(x: Tensor, gamma: Tensor, beta: Tensor, *addend: Tensor) -> Tensor:
        return BatchNorm.apply(x, gamma, beta, 1e-3, addend[0] if addend else None, relu)[0]

    inputs = (x, gamma, beta, addend) if summand else (x, gamma, beta)
    assert torch.autograd.gradcheck(normalise, inputs)
    assert torch.autograd.gradgradcheck(normalise, inputs)
