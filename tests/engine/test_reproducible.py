"""Trials that compare two passes, on a GPU: its kernels may add up in another order each time."""

import contextlib
import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.engine.precision import reproducible
from l2t_fast.learner import reach, traced
from l2t_fast.learner.alike import alike
from tests.engine.test_any_refused import LEAKS
from tests.engine.test_precision import switches
from tests.engine.users import engine, net
from tests.shared import batch, learner
from tests.shared import engine as small_engine

core = pytest.mark.core


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that adds up in any order."""
    for module in (reach, traced):
        monkeypatch.setattr(module, "unordered", lambda tensors: True)


def noise(x: Tensor) -> Tensor:
    """Other numbers each time, of generators that nobody can put back."""
    return torch.from_numpy(np.random.default_rng().standard_normal(x.shape)).to(x)


class Drawing(nn.Module):
    """A relative error, another one each time."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.size * noise(x))


@core
@pytest.mark.parametrize("size", [1e-6, 1e-5])
def test_passes_that_round_otherwise_are_the_same(size: float, gpu: None) -> None:
    engine(net(Drawing(size)))


@core
def test_on_a_cpu_they_are_not() -> None:
    with pytest.raises(L2TError, match="computes something else each time"):
        engine(net(Drawing(1e-4)))


@core
@pytest.mark.parametrize("size", [0.1, 1.0])
def test_draws_of_its_own_are_refused(size: float, gpu: None) -> None:
    with pytest.raises(L2TError, match="computes something else each time"):
        engine(net(Drawing(size)))


@core
@pytest.mark.parametrize("leak", LEAKS)
def test_poison_shows_among_rounding_errors(leak: str, gpu: None) -> None:
    target = net(nn.Sequential(LEAKS[leak](), Drawing(1e-5)))
    with pytest.raises(L2TError, match=r"^parameter '2\.0\.p' of the target is reached past its module"):
        engine(target)


@core
def test_a_graph_that_rounds_otherwise_is_proved(gpu: None) -> None:
    """Of a bias before a BatchNorm the gradient is nothing but rounding errors."""
    torch.manual_seed(0)
    g, bias = torch.randn(1000), 1e-6 * torch.randn(8)
    one, other = [g, bias], [g * (1 + 1e-6 * torch.randn(1000)), -bias]
    assert traced._same(one, other)
    assert not traced._same([1.01 * g, bias], one)
    assert not traced._same([g, 1e4 * bias], one)


@core
def test_nan_infinity_and_counts_are_compared_exactly() -> None:
    x, nan, inf = torch.ones(100), torch.nan, torch.inf
    for value in (nan, inf, -inf):
        other = x.clone()
        other[3] = value
        assert alike([other], [other.clone()], 1e-2)
        assert not alike([other], [x], 1e-2)
        assert not alike([x], [other], 1e-2)
        assert not alike([other], [-other], 1e-2)
    count = torch.tensor(10_000)
    assert alike([count, x], [count.clone(), x + 1e-4], 1e-2)
    assert not alike([count + 1, x], [count, x], 1e-2)
    assert not alike([x], [x, x], 1e-2)
    assert not alike([x], [x[:1]], 1e-2)


def deterministic() -> list[Any]:
    backends: Any = torch.backends
    return [*switches(), backends.cudnn.deterministic, torch.get_deterministic_debug_mode(), list(warnings.filters)]


@core
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_switches_of_a_trial_are_put_back(mode: int) -> None:
    backends: Any = torch.backends
    torch.set_deterministic_debug_mode(mode)
    try:
        before = deterministic()
        with contextlib.suppress(ZeroDivisionError), reproducible(torch.device("cuda")):
            assert not backends.cudnn.benchmark
            assert backends.cudnn.deterministic
            assert (torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision()) == (
                max(mode, 1),
                "highest",
            )
            assert not backends.cudnn.allow_tf32
            with warnings.catch_warnings(record=True) as said:
                warnings.warn("x does not have a deterministic implementation", stacklevel=1)
            assert not said
            raise ZeroDivisionError
        assert deterministic() == before
        with reproducible(torch.device("cpu")):
            assert deterministic() == before
    finally:
        torch.set_deterministic_debug_mode(0)


# On a GPU


def needs_gpu(test: Any) -> Any:
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


class Scattered(nn.Module):
    """Kernels that stay otherwise each time: atomic additions in forward and backward passes."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(x, scale_factor=1.7, mode="bicubic")
        places = torch.arange(y.shape[-1], device=y.device) // 4
        return y.new_zeros(*y.shape[:-1], int(places[-1]) + 1).scatter_add(-1, places.expand_as(y), y)


def on_gpu(target: nn.Module, layers: list[str], size: int = 64) -> L2T:
    torch.manual_seed(0)
    source = resnet34(num_classes=5).cuda()
    x = torch.randn(2, 3, size, size, device="cuda")
    return L2T(source, target.cuda(), source_layers=["layer2"], target_layers=layers, example=x)


@pytest.mark.parametrize("mode", ["eager", "graph", "compile"])
@pytest.mark.parametrize("cudnn", ["benchmark", "deterministic"])
@needs_gpu
def test_resnet18_is_accepted(cudnn: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, cudnn, True)
    before = deterministic()[:-1]
    subject = on_gpu(resnet18(num_classes=3), ["layer1", "layer4"])
    made = Engine(subject, mode=mode, say=lambda text: None)
    if mode == "compile":
        with reproducible(torch.device("cuda")):
            subject.traced_networks()
    else:
        made.step(torch.randn(2, 3, 64, 64, device="cuda"), torch.tensor([0, 1], device="cuda"))
    assert deterministic()[:-1] == before


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@needs_gpu
def test_kernels_that_stay_otherwise_each_time_are_accepted(precision: Any) -> None:
    target = resnet18(num_classes=3)
    target.layer2 = nn.Sequential(target.layer2, Scattered())
    Engine(on_gpu(target, ["layer1"]), mode="eager", precision=precision, say=lambda text: None)


@needs_gpu
def test_draws_of_its_own_are_refused_on_a_gpu() -> None:
    target = resnet18(num_classes=3)
    target.layer2 = nn.Sequential(target.layer2, Drawing(1.0))
    with pytest.raises(L2TError, match="computes something else each time"):
        Engine(on_gpu(target, ["layer1"]), mode="eager", say=lambda text: None)


@needs_gpu
def test_poison_shows_on_a_gpu() -> None:
    target = resnet18(num_classes=3)
    kept = (target.layer2[0].conv1.weight,)
    target.layer2[0].conv1.forward = lambda x: F.conv2d(x, kept[0], stride=2, padding=1)
    with pytest.raises(
        L2TError, match=r"parameter 'layer2\.0\.conv1\.weight' of the target is reached past its module"
    ):
        Engine(on_gpu(target, ["layer1"]), mode="eager", say=lambda text: None)


@needs_gpu
def test_the_learner_at_work() -> None:
    """The ordinary small networks, twice, in the process's own settings."""
    for dtype in (torch.float32, torch.float64):
        subject = learner(dtype, "cuda", 0.25)
        small_engine(copy.deepcopy(subject)).step(*batch(0, 4, dtype, "cuda"))
