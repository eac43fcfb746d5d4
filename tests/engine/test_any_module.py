"""Modules with any Python in them: what the engine trains is what the oracle trains, which runs them untouched."""

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from tests.engine.users import WAYS, assert_same_training, net, ways
from tests.kernels.shared import Reversal

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore")]


class Module(nn.Module):
    """With a convolution `c`, a factor `p` and a gate `g` that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.p = nn.Parameter(torch.randn(4, 1, 1))
        self.g = nn.Parameter(torch.zeros(4, 1, 1))
        self.make()

    def make(self) -> None:
        pass


def runs(forward: Callable[[Any, Tensor], Tensor], make: Callable[[Any], None] = lambda m: None) -> type[Module]:
    """A `Module` with this forward pass."""
    return type("Made", (Module,), {"forward": forward, "make": make})


# In place


def product_in_place(m: Any, x: Tensor) -> Tensor:
    b = m.c(x) * m.g
    b.mul_(3.0)
    return x + b


def sums_and_slices_in_place(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    y += m.c(x) * m.g
    y[:, :2].mul_(m.p[:2])
    return torch.relu_(y) + x


# Regions


def without_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.c(x)


def in_inference_mode(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.c(x)
    return x * m.p + y.clone()


def grad_within_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.c(x)
        with torch.enable_grad():
            z = m.c(x) * m.p
    return x + y + z


def switched_off_and_on(m: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    y = m.c(x)
    torch.set_grad_enabled(True)
    return y + x * m.p


def in_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.c(x)
    return x * m.p + y.double()


# Functions of autograd


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class SavesIntermediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        e = x.exp()
        ctx.save_for_backward(e)
        return e + 1

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class KeepsInContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 3 * ctx.x


def detached(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    return y + (torch.round(y) - y).detach() + x * m.p


def hook_on_a_tensor(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)
    return y * m.p


# Draws


def coin_of_python(m: Any, x: Tensor) -> Tensor:
    return x if m.training and random.random() < 0.5 else x + m.c(x) * m.p


def draw_of_numpy(m: Any, x: Tensor) -> Tensor:
    return x * np.random.rand() + m.c(x) * m.p  # noqa: NPY002


def coin_of_torch(m: Any, x: Tensor) -> Tensor:
    return x if torch.rand(()) < 0.5 else x + m.c(x) * torch.rand_like(x) * m.p


def own_generators(m: Any) -> None:
    m.torchs, m.listed = torch.Generator().manual_seed(3), [torch.Generator().manual_seed(4)]
    m.pythons, m.numpys = random.Random(5), np.random.default_rng(6)


def draw_of_own(m: Any, x: Tensor) -> Tensor:
    first, second = (torch.rand(x.shape, generator=g, dtype=x.dtype) for g in (m.torchs, m.listed[0]))
    return x * m.pythons.random() + m.c(x) * m.p * first + second * m.numpys.random()


def drop_path(m: Any, x: Tensor) -> Tensor:
    return x + m.drop(m.c(x) * m.g)


# Parameters that are made of others


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + w.flip(0)


def normed(norm: Callable[[nn.Module], nn.Module], channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(nn.Conv2d(4, channels, 3, padding=1)), nn.Conv2d(channels, 4, 1))


def symmetric(m: Any) -> None:
    parametrize.register_parametrization(m.c, "weight", Symmetric())


def cached(m: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        return m.c(m.c(x) * m.p)


def tied(m: Any) -> None:
    m.d = nn.Conv2d(4, 4, 3, padding=1)
    m.d.weight = m.c.weight


# Ways to a layer


def bound_method(m: Any) -> None:
    m.act = m.times
    m.doubled = functools.partial(m.times, 2)


def times(m: Any, x: Any, y: Tensor | None = None) -> Tensor:
    return x * m.p if y is None else x * y * m.p


class CalledOtherwise(Module):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x) * self.p


class OwnConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def knows_classes(m: Any, x: Tensor) -> Tensor:
    return m.c(x) * m.p if type(m.c) is nn.Conv2d else x


def asks_for_parameters(m: Any, x: Tensor) -> Tensor:
    doubled = 2 if isinstance(m.p, nn.Parameter) and dict(m.named_parameters())["p"] is m.p else 1
    return m.c(x) * m.get_parameter("p") * doubled


def parameter_containers(m: Any) -> None:
    m.listed = nn.ParameterList([torch.randn(4, 1, 1), torch.randn(4, 1, 1)])
    m.named = nn.ParameterDict({"a": torch.randn(4, 1, 1)})


def in_plain_lists(m: Any) -> None:
    m.layers, m.unregistered = [m.c, m.c], (nn.Conv2d(4, 4, 1).double(),)


def recurrent(kind: Callable[..., nn.Module]) -> type[Module]:
    def make(m: Any) -> None:
        m.r = kind(4, 2, bidirectional=True, batch_first=True)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(x) + m.r(x.mean(2).transpose(1, 2))[0].transpose(1, 2)[:, :, None] * m.p

    return runs(forward, make)


def attention(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)[:, ::4]
    return m.c(x) + m.a(tokens, tokens, tokens, need_weights=False)[0].mean(1)[:, :, None, None] * m.p


def with_attention(m: Any) -> None:
    m.a = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.2)


CASES: dict[str, Callable[[], nn.Module]] = {
    **{f.__name__: runs(f) for f in (product_in_place, sums_and_slices_in_place)},
    **{f.__name__: runs(f) for f in (without_grad, in_inference_mode, grad_within_no_grad, switched_off_and_on)},
    **{f.__name__: runs(f) for f in (in_autocast, detached, hook_on_a_tensor)},
    "reversal": runs(lambda m, x: Reversal.apply(m.c(x)) * m.p),
    "rounded weight": runs(lambda m, x: F.conv2d(x, Rounded.apply(m.c.weight), padding=1) * m.p),
    "saves intermediate": runs(lambda m, x: SavesIntermediate.apply(m.c(x) * 0.1) * m.p),
    "keeps in context": runs(lambda m, x: KeepsInContext.apply(m.c(x)) * m.p),
    **{f.__name__: runs(f) for f in (coin_of_python, draw_of_numpy, coin_of_torch)},
    "own generators": runs(draw_of_own, own_generators),
    "drop path": runs(drop_path, lambda m: setattr(m, "drop", DropPath(0.4))),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.3), nn.Conv2d(4, 4, 1), nn.Dropout2d(0.5)),
    "spectral_norm, 32": normed(spectral_norm, 32),
    "spectral_norm, 5": normed(spectral_norm, 5),
    "parametrized spectral_norm, 32": normed(parametrizations.spectral_norm, 32),
    "parametrized spectral_norm, 5": normed(parametrizations.spectral_norm, 5),
    "weight_norm": normed(weight_norm, 5),
    "parametrized weight_norm": normed(parametrizations.weight_norm, 5),
    "orthogonal": normed(parametrizations.orthogonal, 4),
    "cached parametrization": runs(cached, symmetric),
    "tied": runs(lambda m, x: m.d(m.c(x)) * m.p, tied),
    "reused": runs(lambda m, x: m.c(torch.tanh(m.c(x))) * m.p),
    "bound methods": lambda: type(
        "Bound", (runs(lambda m, x: m.doubled(m.act(m.c(x))), bound_method),), {"times": times}
    )(),
    "__call__": CalledOtherwise,
    "subclass": runs(lambda m, x: m.c(x) * m.p, lambda m: setattr(m, "c", OwnConvolution(4, 4, 1))),
    "forward called": runs(lambda m, x: m.c.forward(x) * m.p),
    "forward of the class called": runs(lambda m, x: nn.Conv2d.forward(m.c, x) * m.p),
    "forward set": runs(
        lambda m, x: m.c(x) * m.p, lambda m: setattr(m.c, "forward", functools.partial(nn.Conv2d.forward, m.c))
    ),
    "functional_call": runs(
        lambda m, x: torch.func.functional_call(m.c, {"weight": m.c.weight * 2}, (x,)) * m.p,
    ),
    "knows_classes": runs(knows_classes),
    "plain lists": runs(lambda m, x: m.unregistered[0](m.layers[1](m.layers[0](x))) * m.p, in_plain_lists),
    "asks for parameters": runs(asks_for_parameters),
    "ParameterList": runs(lambda m, x: m.c(x) * m.listed[0] + m.listed[1] * m.named["a"], parameter_containers),
    "pruned": lambda: prune.random_unstructured(nn.Conv2d(4, 4, 3, padding=1), "weight", 0.5),
    "vmap": runs(lambda m, x: torch.func.vmap(lambda z: m.c(z[None])[0])(x) * m.p),
    "jvp": runs(lambda m, x: x + torch.func.jvp(m.c, (x,), (x * m.p,))[1]),
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
    "attention": runs(attention, with_attention),
}


@ways(CASES)
def test_any_module(case: Callable[[], nn.Module], way: dict[str, Any]) -> None:
    assert_same_training(lambda: net(case()), way)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['scheme']}-{way['inner_steps']}-{way['memory']}")
@pytest.mark.parametrize("name", ["product_in_place", "own generators", "spectral_norm, 5"])
def test_every_way(name: str, way: dict[str, Any]) -> None:
    assert_same_training(lambda: net(CASES[name]()), way)


def test_what_runs_without_grad_moves_by_weight_decay_alone() -> None:
    made, _ = assert_same_training(lambda: net(runs(without_grad)()), {"inner_steps": 2}, steps=1, momentum=0.0)
    torch.manual_seed(3)
    start = net(runs(without_grad)())[2]
    moved = made.learner.target[2]
    for name in ("weight", "bias"):
        torch.testing.assert_close(
            getattr(moved.c, name), getattr(start.c, name) * (1 - 0.05 * 1e-2), rtol=1e-7, atol=0
        )


# What the oracle cannot differentiate: it runs the same network without


def in_checkpoint(reentrant: bool | None) -> type[Module]:
    def forward(m: Any, x: Tensor) -> Tensor:
        def part(z: Tensor) -> Tensor:
            return F.dropout(torch.tanh(m.c(z) * m.p), 0.3)

        return part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)

    return runs(forward)


@ways({"reentrant": True, "not reentrant": False})
def test_checkpointed_layers(case: bool, way: dict[str, Any]) -> None:
    for way_ in (way, WAYS[1]):
        assert_same_training(lambda: net(in_checkpoint(case)()), way_, plainly=lambda: net(in_checkpoint(None)()))


@ways({backend: backend for backend in ("eager", "aot_eager")})
def test_compiled_parts(case: str, way: dict[str, Any]) -> None:
    def inner() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.BatchNorm2d(4))

    def compiled() -> nn.Module:
        return net(nn.Sequential(torch.compile(inner(), backend=case)))

    assert_same_training(compiled, way, plainly=lambda: net(nn.Sequential(inner())))
    torch.compiler.reset()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_networks(wrap: Callable[[nn.Module], nn.Module]) -> None:
    def plainly() -> nn.Module:
        return net(nn.Tanh())

    assert_same_training(lambda: wrap(plainly()), WAYS[0], plainly=plainly)
