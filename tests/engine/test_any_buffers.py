"""Modules that keep something from one pass to the next: buffers and attributes of every kind, against the oracle."""

from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tests.engine.users import assert_same_training, batch, engine, net, values, ways

pytestmark = pytest.mark.core


def mean(x: Tensor) -> Tensor:
    """[4, 1, 1]."""
    return x.mean((0, 2, 3), keepdim=True)[0]


class Norm(nn.Module):
    """Subtracts a running mean `m` [4, 1, 1] in training, too."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.p = nn.Parameter(torch.randn(4, 1, 1))
        self.keep(torch.zeros(4, 1, 1, dtype=torch.float64))

    def keep(self, m: Tensor) -> None:
        self.register_buffer("m", m)

    def update(self, mu: Tensor) -> Any:
        self.m.mul_(0.9).add_(0.1 * mu.detach())
        return self.m

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x * (1 + self.update(mean(x)))) * self.p


class Reassigned(Norm):
    def update(self, mu: Tensor) -> Any:
        self.m = 0.9 * self.m + 0.1 * mu.detach()
        return self.m


class WithGraph(Norm):
    def update(self, mu: Tensor) -> Any:
        self.m = 0.9 * self.m + 0.1 * mu
        return self.m


class WithoutGrad(Norm):
    @torch.no_grad()
    def update(self, mu: Tensor) -> Any:
        return self.m.lerp_(mu, 0.1).clone()


class ByData(Norm):
    def update(self, mu: Tensor) -> Any:
        self.m.data = 0.9 * self.m.data + 0.1 * mu.data
        return self.m.clone()


class IntoData(Norm):
    def update(self, mu: Tensor) -> Any:
        self.m.data.mul_(0.9).add_(0.1 * mu.data)
        return self.m.clone()


class NotPersistent(Norm):
    def keep(self, m: Tensor) -> None:
        self.register_buffer("m", m, persistent=False)


class NoneAtFirst(Norm):
    def keep(self, m: Tensor) -> None:
        self.register_buffer("m", None)

    def update(self, mu: Tensor) -> Any:
        self.m = mu.detach() if self.m is None else 0.9 * self.m + 0.1 * mu.detach()
        return self.m


class Attribute(Norm):
    def keep(self, m: Tensor) -> None:
        self.m = m


class AttributeReassigned(Reassigned):
    keep = Attribute.keep


class AttributeWithGraph(WithGraph):
    keep = Attribute.keep


class MadeLate(Norm):
    def keep(self, m: Tensor) -> None:
        pass

    def update(self, mu: Tensor) -> Any:
        self.late = 0.9 * self.late + 0.1 * mu.detach() if hasattr(self, "late") else mu.detach()
        return self.late


class InList(Norm):
    def keep(self, m: Tensor) -> None:
        self.kept = [m, 0]

    def update(self, mu: Tensor) -> Any:
        self.kept[0] = 0.9 * self.kept[0] + 0.1 * mu.detach()
        self.kept[1] += 1
        return self.kept[0] * self.kept[1]


class InDictionary(Norm):
    def keep(self, m: Tensor) -> None:
        self.kept = {"of": {"m": m}, "mean": [0.0]}

    def update(self, mu: Tensor) -> Any:
        self.kept["of"]["m"].mul_(0.9).add_(0.1 * mu.detach())
        self.kept["mean"].append(mu.mean().item())
        return self.kept["of"]["m"].clone() + sum(self.kept["mean"])


class Queue(Norm):
    def keep(self, m: Tensor) -> None:
        self.queue = deque([m], maxlen=3)

    def update(self, mu: Tensor) -> Any:
        self.queue.append(mu.detach())
        return sum(self.queue)


class Counter(Norm):
    def keep(self, m: Tensor) -> None:
        self.count, self.counts = 0, {"passes": 0}

    def update(self, mu: Tensor) -> Any:
        self.count += 1
        self.counts["passes"] += 2
        return 0.1 * self.count + 0.05 * self.counts["passes"]


class AverageOfWeights(Norm):
    def keep(self, m: Tensor) -> None:
        self.register_buffer("average", self.c.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.lerp_(self.c.weight, 0.3)
        return F.conv2d(x, self.average + self.c.weight, padding=1) * self.p


class AverageAsAttribute(Norm):
    def keep(self, m: Tensor) -> None:
        self.average = None

    def forward(self, x: Tensor) -> Tensor:
        w = self.c.weight.detach().clone()
        self.average = w if self.average is None else 0.7 * self.average + 0.3 * w
        return F.conv2d(x, self.average + self.c.weight, padding=1) * self.p


class WithBatchNorm(nn.Module):
    """A BatchNorm that is used in another way than by calling it, or whose running statistics are read in training."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.bound = self.bn.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x)) + self.bn.running_mean[:, None, None]


class Functional(WithBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        y = F.batch_norm(self.c(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.3)
        return y + bn.running_mean[:, None, None]


class OfTheClass(WithBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self.bn, self.c(x))


class Bound(WithBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bound(self.c(x))


class OwnForward(WithBatchNorm):
    def __init__(self) -> None:
        super().__init__()
        bn = self.bn
        self.bn.forward = lambda x: nn.BatchNorm2d.forward(bn, x) * bn.running_var[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class Renormalisation(WithBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        x, bn = self.c(x), self.bn
        variance, mu = torch.var_mean(x, (0, 2, 3))
        y = F.batch_norm(x, None, None, None, None, True, 0.0, bn.eps)
        with torch.no_grad():
            bn.running_mean.lerp_(mu, 0.1)
            bn.running_var.lerp_(variance, 0.1)
        return y * (variance / bn.running_var).sqrt().detach()[:, None, None] + bn.bias[:, None, None]


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def several_norms() -> nn.Module:
    kinds = [
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, momentum=None),
    ]
    kinds += [nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.GroupNorm(2, 4), BatchNormAct2d(4)]
    return nn.Sequential(nn.Conv2d(4, 4, 1), *kinds)


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(norm, nn.Tanh(), norm)


def shared_statistics() -> nn.Module:
    one, other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    other.running_mean = one.running_mean
    return nn.Sequential(one, nn.Tanh(), other)


def frozen_2d() -> nn.Module:
    frozen = FrozenBatchNorm2d(4)
    frozen.running_mean.normal_()
    return nn.Sequential(nn.Conv2d(4, 4, 1), frozen)


def subclass() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(Doubled(4)))


KINDS: list[Any] = [Norm, Reassigned, WithGraph, WithoutGrad, ByData, IntoData, NotPersistent, NoneAtFirst, Attribute]
KINDS += [AttributeReassigned, AttributeWithGraph, MadeLate, InList, InDictionary, Queue, Counter]
KINDS += [AverageOfWeights, AverageAsAttribute, WithBatchNorm, Functional, OfTheClass, Bound, OwnForward]
KINDS += [Renormalisation, several_norms, shared_norm, shared_statistics, frozen_2d, subclass]


@ways(KINDS)
def test_what_is_kept_between_passes(case: Any, way: dict[str, Any]) -> None:
    assert_same_training(lambda: net(case()), way)


@pytest.mark.parametrize("case", [NoneAtFirst, Queue, Attribute, Functional], ids=lambda case: case.__name__)
def test_what_is_kept_is_replayed_in_recompute_as_in_save(case: Any) -> None:
    made = [engine(net(case()), memory=memory, inner_steps=3) for memory in ("save", "recompute")]
    for one, other in zip(made[0].learner.parameters(), made[1].learner.parameters(), strict=True):
        one.data.copy_(other)
    for seed in range(2):
        one, other = (m.meta_gradient(*batch(seed)) for m in made)
        assert all((g - other[name]).norm() <= 1e-10 * other[name].norm() for name, g in one.items())
        for m in made:
            m.step(*batch(seed))


def test_meta_gradient_leaves_what_is_kept() -> None:
    for case in (Norm, Attribute, InDictionary, Queue, NoneAtFirst, MadeLate, Counter, Functional):
        target = net(case())
        made = engine(target)
        before = {name: value.clone() for name, value in values(target).items()}
        made.meta_gradient(*batch(0))
        after = values(target)
        assert after.keys() == before.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


class Frozen(nn.Sequential):
    """Whose BatchNorms stay in evaluation mode."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def with_norms(kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    network = kind(*net(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.train()


def evaluation_later(target: nn.Module, step: int) -> None:
    target[1].train(step != 1)
    target[2][1].train(step != 2)


def settings_later(target: nn.Module, step: int) -> None:
    for name, value in [("momentum", 0.5), ("momentum", None), ("track_running_stats", False), ("eps", 0.1)][
        step : step + 1
    ]:
        setattr(target[1], name, value)


def evaluation_as_a_whole(target: nn.Module, step: int) -> None:
    target.train(step != 1)


@ways({f.__name__: f for f in (evaluation_later, settings_later, evaluation_as_a_whole)})
def test_what_is_set_later_counts(case: Any, way: dict[str, Any]) -> None:
    assert_same_training(with_norms, way, between=case, steps=4)


def test_frozen_statistics_normalise_and_stay() -> None:
    made, _ = assert_same_training(lambda: with_norms(Frozen), {"inner_steps": 2})
    target = made.learner.target
    before = [target[1].running_mean.clone(), target[2][1].running_var.clone()]
    made.step(*batch(5))
    assert torch.equal(before[0], target[1].running_mean)
    assert torch.equal(before[1], target[2][1].running_var)
    assert not any(norm.num_batches_tracked for norm in (target[1], target[2][1]))


def test_counters_are_in_the_state() -> None:
    made = engine(net(BatchNormAct2d(4)))
    for i in range(3):
        made.step(*batch(i))
    assert made.state_dict()["buffers"]["2.num_batches_tracked"] == 3
