"""What a forward pass changes elsewhere than in its module (children, their settings, objects), and who reads it."""

import copy
import pickle
import types
from collections import Counter, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torchs

from l2t_fast import L2TError
from tests.engine.test_any_buffers import Norm
from tests.engine.test_any_module import Module, runs
from tests.engine.users import WAYS, assert_close, assert_same_training, batch, engine, net, seed_all, source, ways

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore")]

Held = namedtuple("Held", "passes")


def counting(count: Callable[[Any], float], make: Callable[[Any], None]) -> type[Module]:
    """Counts its passes and changes from the tenth on: a trial does not show what decides."""
    return runs(lambda m, x: m.c(x) * m.p * (1 + 0.1 * max(count(m) - 9, 0)), make)


def of_object(m: Any) -> float:
    m.state.n += 1
    return m.state.n


def of_child(m: Any) -> float:
    m.c.calls = getattr(m.c, "calls", 0) + 1
    return m.c.calls


def of_tuple(m: Any) -> float:
    m.held.passes.append(1)
    return len(m.held.passes)


def of_counter(m: Any) -> float:
    m.counter.update(["passes"])
    return m.counter["passes"]


def object_in_list(m: Any) -> float:
    m.states[0].n += 1
    return m.states[0].n


def settings_of_children(m: Any, x: Tensor) -> Tensor:
    m.drop.p = min(0.9, m.drop.p + 0.05)
    m.norm.momentum *= 0.7
    return m.drop(m.norm(m.c(x))) * m.p


def tensor_of_child(m: Any, x: Tensor) -> Tensor:
    m.c.last = x.detach().mean() + getattr(m.c, "last", 0.0)
    return m.c(x) * m.p * m.c.last


def child_comes_and_goes(m: Any, x: Tensor) -> Tensor:
    if hasattr(m, "late"):
        del m.late
        return m.c(x) * m.p
    m.late = nn.Identity()
    return 2 * m.late(m.c(x)) * m.p


def mode_changes(m: Any, x: Tensor) -> Tensor:
    m.norm.train(not m.norm.training)
    return m.norm(m.c(x)) * m.p


def with_norm(m: Any) -> None:
    m.norm, m.drop = nn.BatchNorm2d(4), nn.Dropout(0.1)


class OtherType(Norm):
    """A whole number at first."""

    def keep(self, m: Tensor) -> None:
        self.register_buffer("m", torch.tensor(0))

    def update(self, mu: Tensor) -> Any:
        self.m = self.m + 0.25
        return self.m


CASES: dict[str, Callable[[], nn.Module]] = {
    "object": counting(of_object, lambda m: setattr(m, "state", types.SimpleNamespace(n=0))),
    "object in a list": counting(object_in_list, lambda m: setattr(m, "states", [types.SimpleNamespace(n=0)])),
    "tuple of lists": counting(of_tuple, lambda m: setattr(m, "held", Held([]))),
    "Counter": counting(of_counter, lambda m: setattr(m, "counter", Counter())),
    "child": counting(of_child, lambda m: None),
    "tensor of a child": runs(tensor_of_child),
    "settings of children": runs(settings_of_children, with_norm),
    "child comes and goes": runs(child_comes_and_goes),
    "mode changes": runs(mode_changes, with_norm),
    "buffer of another type": OtherType,
}


@ways(CASES)
def test_what_is_kept_elsewhere(case: Callable[[], nn.Module], way: dict[str, Any]) -> None:
    assert_same_training(lambda: net(case()), way, steps=4)


class AsBuffer(Norm):
    def update(self, mu: Tensor) -> Any:
        self.m = 0.5 * self.m + mu.detach()
        return self.m


class AsAttribute(AsBuffer):
    def keep(self, m: Tensor) -> None:
        self.m = m


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_parts_of_a_batch_have_attributes_as_they_have_buffers(memory: Any) -> None:
    """Each part starts from the same ones, and afterwards there are the first part's."""
    trained = []
    for kind in (AsBuffer, AsAttribute):
        seed_all(3)
        made = engine(net(kind()), accumulate=2, memory=memory)
        gradients = made.meta_gradient(*batch(0))
        for seed in range(2):
            made.step(*batch(seed))
        trained.append({**gradients, **made.trained.theta, "m": made.learner.target[2].m})
    assert_close(trained[1], trained[0])


def test_a_buffer_that_changes_its_type_is_refused_where_parts_would_share_it() -> None:
    with pytest.raises(L2TError, match=r"^buffer 'm' changes its dtype or shape"):
        engine(net(OtherType()), accumulate=2).step(*batch(0))


def test_the_meta_gradient_leaves_a_source_as_it_was() -> None:
    seen = source()
    seen.append(runs(of_source, lambda m: setattr(m, "count", 0))().double())
    made = engine(net(nn.Tanh()), source=seen, source_layers=["2"])
    first = made.meta_gradient(*batch(0))
    assert_close(made.meta_gradient(*batch(0)), first)


def of_source(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.c(x) * m.count


# Hooks that read


def on_parameter(hook: Callable[[Tensor, Any], Tensor]) -> Callable[[nn.Module], Any]:
    return lambda t: t.get_parameter("2.weight").register_hook(lambda g: hook(g, t))


def counted(g: Tensor, t: Any) -> Tensor:
    t[2].count = getattr(t[2], "count", 0) + 1
    return g * (1 + 0.1 * t[2].count)


READ: dict[str, Callable[[nn.Module], Any]] = {
    "own parameter": lambda t: _held(t, lambda g, p: g + 0.1 * p.detach()),
    "another": on_parameter(lambda g, t: g * t[0].weight.detach().norm()),
    "running statistics": on_parameter(lambda g, t: g * (1 + t[1].running_mean.sum())),
    "counted": on_parameter(counted),
    "of a module": lambda t: t[2].register_full_backward_hook(lambda m, gi, go: (gi[0] * (1 + m.weight.norm()),)),
    "before a module": lambda t: t[2].register_full_backward_pre_hook(
        lambda m, go: (go[0] * m.weight.detach().norm(),)
    ),
}


def _held(t: nn.Module, hook: Callable[[Tensor, Tensor], Tensor]) -> None:
    p = t.get_parameter("2.weight")
    p.register_hook(lambda g: hook(g, p))


def hooked(case: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        target = net(nn.Conv2d(4, 4, 3, padding=1))
        case(target)
        return target

    return build


@ways(READ)
def test_hooks_read_what_the_step_has(case: Callable[[nn.Module], Any], way: dict[str, Any]) -> None:
    assert_same_training(hooked(case), way)


FAILING: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "its own derivative": (
        lambda t: _held(t, lambda g, p: g + 0.1 * p),
        "a hook makes a gradient of parameter '2.weight'",
    ),
    "several": (
        lambda t: torch.autograd.graph.register_multi_grad_hook(list(t.parameters()), lambda g: None),
        r"a hook of 'target\.0\.weight' fails on its gradient alone",
    ),
    "another dtype": (on_parameter(lambda g, t: g.float()), r"a hook of 'target\.2\.weight' makes torch.float32"),
}


@pytest.mark.parametrize("name", FAILING)
def test_hooks_that_cannot_be_followed_are_refused(name: str) -> None:
    case, message = FAILING[name]
    made = engine(hooked(case)())
    before = copy.deepcopy(made.learner.target.state_dict())
    with pytest.raises(L2TError, match=f"^{message}"):
        made.step(*batch(0))
    torch.testing.assert_close(made.learner.target.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("before", [False, True])
def test_hooks_of_all_modules_act_as_those_of_one(before: bool) -> None:
    def acts(module: nn.Module, *gradients: Any) -> Any:
        return (gradients[0][0] * 1.3,) if isinstance(module, nn.Tanh) else None

    name = "full_backward_pre_hook" if before else "full_backward_hook"
    gradients = []
    for everywhere in (False, True):
        seed_all(3)
        target = net(nn.Tanh())
        handle = getattr(torchs if everywhere else target[2], f"register_{'module_' * everywhere}{name}")(acts)
        try:
            made = engine(target)
            made.step(*batch(0))
            gradients.append(made.meta_gradient(*batch(1)))
        finally:
            handle.remove()
    assert_close(gradients[1], gradients[0])


# Losses that read


class Auxiliary(nn.Module):
    """With a loss of its own, as an attribute or packed beside the logits."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.c, self.gate, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.Linear(4, 3)
        self.packed = packed
        self.auxiliary: Any = None

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.c(x)).mean((2, 3))
        self.auxiliary = self.gate(z).softmax(1).square().mean()
        beside = [self.auxiliary.expand(len(x), 1)] if self.packed else []
        return torch.cat([self.head(z), *beside], 1)


@pytest.mark.parametrize("way", WAYS[:2], ids=["save", "recompute"])
def test_a_loss_reads_what_the_pass_has_left(way: dict[str, Any]) -> None:
    trained = []
    for packed in (True, False):
        seed_all(3)
        target = Auxiliary(packed).double()

        def loss(outputs: Tensor, y: Tensor, target: Any = target, packed: bool = packed) -> Tensor:
            auxiliary = outputs[0, 3] if packed else target.auxiliary
            return F.cross_entropy(outputs[:, :3], y) * (1 + auxiliary)

        made = engine(target, ("c",), loss=loss, **way)
        made.step(*batch(0), batch(5))
        trained.append({**made.meta_gradient(*batch(1), batch(6)), **made.trained.theta})
    assert_close(trained[1], trained[0])


@pytest.mark.parametrize("read", [lambda t: t[0].weight.detach().norm(), lambda t: 1 + t[1].running_mean.sum()])
def test_a_loss_that_reads_parameters_or_changing_buffers_is_refused(read: Callable[[Any], Tensor]) -> None:
    target = net(nn.Tanh())
    made = engine(target, loss=lambda outputs, y: F.cross_entropy(outputs * read(target), y))
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(L2TError, match=r"^the loss reads parameters or buffers of the target"):
        made.step(*batch(0))
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_a_loss_may_read_a_buffer_that_stays() -> None:
    target = net(nn.Tanh())
    target.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
    engine(target, loss=lambda outputs, y: F.cross_entropy(outputs * target.scale, y)).step(*batch(0))


# Other things that are alike


def test_a_norm_without_bias() -> None:
    def build() -> nn.Module:
        norm = nn.BatchNorm2d(4)
        norm.register_parameter("bias", None)
        return net(norm)

    assert_same_training(build, WAYS[0])


def test_a_feature_of_lower_precision_is_matched_in_that_of_the_images() -> None:
    def low(m: Any, x: Tensor) -> Tensor:
        return m.low(m.c(x).float()).double() * m.p

    seed_all(3)
    made = engine(net(runs(low, lambda m: setattr(m, "low", nn.Tanh()))()), ("2.low",))
    seed_all(3)
    widened = runs(
        lambda m, x: m.low(m.c(x).float()) * m.p,
        lambda m: setattr(m, "low", type("Wide", (nn.Tanh,), {"forward": lambda m, x: torch.tanh(x).double()})()),
    )
    wide = engine(net(widened()), ("2.low",))
    assert_close(made.meta_gradient(*batch(0)), wide.meta_gradient(*batch(0)))


def test_a_pickled_learner_trains() -> None:
    made = engine(net(nn.Tanh()))
    other = type(made)(pickle.loads(pickle.dumps(made.learner)), lr=0.05, say=lambda text: None)
    assert_close(other.meta_gradient(*batch(0)), type(made)(made.learner, lr=0.05).meta_gradient(*batch(0)))


def swapped(m: Any, x: Tensor) -> Tensor:
    m.u, m.v = m.v, m.u
    return m.u(x) + 2 * m.v(m.c(x))


def two(m: Any) -> None:
    m.u, m.v = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)


def one_memory() -> nn.Module:
    target = net(runs(lambda m, x: m.u(m.v(x)), two)())
    target[2].u.weight = nn.Parameter(target[2].v.weight.data)
    return target


def sparse(m: Any, x: Tensor) -> Tensor:
    return m.c(x) * m.e((x.mean((1, 2, 3)) > 0).long())[:, :, None, None]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "children swapped": (lambda: net(runs(swapped, two)()), r"parameter '2\.[uv]\..*' of the target changes its place"),
    "one memory": (one_memory, r"parameters '2\.u\.weight' and '2\.v\.weight' of the target share memory"),
    "sparse gradients": (
        lambda: net(runs(sparse, lambda m: setattr(m, "e", nn.Embedding(2, 4, sparse=True)))()),
        r"the gradient of parameter '2\.e\.weight' of the target is sparse",
    ),
    "writes into images": (
        lambda: nn.Sequential(type("Writes", (nn.Module,), {"forward": lambda m, x: x.mul_(2)})(), net(nn.Tanh())),
        "the target writes into the images",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_sentence(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(L2TError, match=f"^{message}") as raised:
        engine(build(), ("1.0",) if name == "writes into images" else ("0",))
    assert str(raised.value).count("\n") == 0


def test_a_source_that_shares_buffers_or_memory_is_refused() -> None:
    for share in (
        lambda s, t: setattr(s[1], "running_mean", t[1].running_mean),
        lambda s, t: setattr(s[0], "weight", nn.Parameter(t[0].weight.data)),
    ):
        target, seen = net(nn.Tanh()), net(nn.Tanh())
        share(seen, target)
        with pytest.raises(L2TError, match=r"^a source and the target share (buffers|parameters)"):
            engine(target, source=seen)
