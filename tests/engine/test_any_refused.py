"""What is refused is refused at once and changes nothing, what fails halfway too; a target keeps nothing of ours."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from l2t_fast import Engine, L2TError
from tests.engine.test_any_module import Module, runs
from tests.engine.users import RULE, WAYS, batch, engine, learner, net, source, trained, values

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore")]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state_of(network: nn.Module) -> dict[str, Any]:
    """All that must be left alone."""
    return {
        "classes": [type(m) for m in network.modules()],
        "attributes": [sorted(vars(m)) for m in network.modules()],
        "modes": [m.training for m in network.modules()],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in network.parameters()],
        "hooks": [[*map(id, getattr(m, kind).values())] for m in network.modules() for kind in HOOKS],
        "parameter hooks": [[*map(id, (p._backward_hooks or {}).values())] for p in network.parameters()],
        "tensors": [id(t) for t in (*network.parameters(), *network.buffers())],
        "values": {name: value.tolist() for name, value in values(network).items()},
    }


class Failing(nn.Module):
    """Keeps things of several kinds, and fails in its pass number `at`."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("m", torch.zeros(4, dtype=torch.float64))
        self.where, self.at, self.count, self.log = where, 0, 0, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.log.append(self.count)
        self.m.add_(1)
        y = self.bn(self.c(x))
        if self.count == self.at:
            if self.where == "backward":
                y.register_hook(self.fail)
            else:
                self.fail()
        return y

    def fail(self, *_: Any) -> None:
        raise KeyboardInterrupt if self.where == "interrupt" else ValueError("as arranged")


@pytest.mark.parametrize("way", WAYS[:2], ids=["transfer", "simulation"])
@pytest.mark.parametrize(
    ("where", "at"),
    [("forward", 1), ("forward", 3), ("forward", 4), ("backward", 1), ("backward", 4), ("interrupt", 3)],
)
def test_a_step_that_fails_halfway_leaves_all_as_it_was(where: str, at: int, way: dict[str, Any]) -> None:
    failing = Failing(where)
    target = net(failing)
    made = engine(target, **way)
    for p in target.parameters():
        p.grad = torch.ones_like(p)
    made.step(*batch(0), batch(1))
    failing.at = failing.count + at
    before = state_of(target), copy.deepcopy(trained(made)), copy.deepcopy(made.state_dict()["adam"])
    before_as_whole = copy.deepcopy(made.state_dict())
    with pytest.raises((L2TError, ValueError, KeyboardInterrupt), match="as arranged" if where != "interrupt" else ""):
        made.step(*batch(2), batch(3))
    assert state_of(target) == before[0]
    after = trained(made), made.state_dict()["adam"], made.state_dict()
    torch.testing.assert_close(after, (*before[1:], before_as_whole), rtol=0, atol=0)
    failing.at = 0
    made.step(*batch(2), batch(3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(x.flatten(0, 1))[0].unflatten(0, (-1, 4))


def test_a_target_keeps_nothing_of_ours() -> None:
    target = net(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), Recurrent()))
    recurrent = target[2][2].r
    for p in target.parameters():
        p.grad = torch.ones_like(p)
    keys = ("classes", "attributes", "modes", "requires_grad", "grad", "hooks", "tensors")
    before = state_of(target)
    made = engine(target)
    for i in range(3):
        made.step(*batch(i))
        made.meta_gradient(*batch(i))
    after = state_of(target)
    assert {key: after[key] for key in keys} == {key: before[key] for key in keys}
    own = {id(p) for p in recurrent.parameters()}
    assert all(id(w) in own for w in recurrent._flat_weights)
    x = batch(0)[0]
    for copied in (pickle.loads(pickle.dumps(target)), copy.deepcopy(target)):
        torch.testing.assert_close(copied.eval()(x), copy.deepcopy(target).eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_is_not_copied(copied: Callable[[Engine], Any]) -> None:
    with pytest.raises(L2TError, match=r"cannot be copied or pickled: make a new one, and load its state_dict\(\)\.$"):
        copied(engine(net(nn.Tanh())))


def test_a_copied_learner_trains_its_own_target() -> None:
    target = net(nn.Tanh())
    of = learner(target)
    own = copy.deepcopy(of)
    start = copy.deepcopy(target.state_dict())
    Engine(own, **RULE, say=lambda text: None).step(*batch(0))
    torch.testing.assert_close(target.state_dict(), start, rtol=0, atol=0)
    assert not torch.equal(own.target[0].weight, target[0].weight)


# Ways past a module


class Holder:
    weight: Tensor


def holder(m: Any) -> None:
    m.holder = Holder()
    m.holder.weight = m.p


def view(m: Any) -> None:
    m.double()
    m.view = m.p.view(-1)


def closure(m: Any) -> None:
    p = m.p
    m.act = lambda x: x * p


LEAKS: dict[str, type[Module]] = {
    "tuple": runs(lambda m, x: m.c(x) * m.kept[0], lambda m: setattr(m, "kept", (m.p,))),
    "nested dictionary": runs(lambda m, x: m.c(x) * m.kept["a"]["p"], lambda m: setattr(m, "kept", {"a": {"p": m.p}})),
    "closure": runs(lambda m, x: m.act(m.c(x)), closure),
    "object": runs(lambda m, x: m.c(x) * m.holder.weight, holder),
    "view": runs(lambda m, x: m.c(x) * m.view.view(4, 1, 1), view),
    "value alone": runs(lambda m, x: m.c(x) * m.kept[0].detach(), lambda m: setattr(m, "kept", (m.p,))),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_parameter_that_is_reached_past_its_module_is_refused(leak: str) -> None:
    target = net(LEAKS[leak]())
    before = state_of(target)
    with pytest.raises(L2TError, match=r"^parameter '2\.p' of the target is reached past its module"):
        engine(target)
    assert state_of(target) == before


def test_lists_and_dictionaries_of_parameters_are_followed() -> None:
    def make(m: Any) -> None:
        m.kept, m.named = [m.p], {"g": m.g}

    target = net(runs(lambda m, x: m.c(x) * m.kept[0] + m.named["g"], make)())
    plain = net(runs(lambda m, x: m.c(x) * m.p + m.g, make)())
    plain.load_state_dict(target.state_dict())
    one, other = engine(target), engine(plain)
    for name, g in one.meta_gradient(*batch(0)).items():
        torch.testing.assert_close(g, other.meta_gradient(*batch(0))[name], rtol=1e-12, atol=0)
    assert target[2].kept[0] is target[2].p


# Refused, with one sentence, before anything has changed


class Counts(Module):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Counts.passes += 1
        return self.c(x) * Counts.passes


def clamped(m: Any, x: Tensor) -> Tensor:
    m.p.data.clamp_(-5, 5)
    return m.c(x) * m.p


def replaced(m: Any, x: Tensor) -> Tensor:
    m.p.data = m.p.data.clamp(-5, 5)
    return m.c(x) * m.p


def teacher(m: Any) -> None:
    m.teacher = copy.deepcopy(m.c).requires_grad_(False)


def follows(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.teacher.weight.lerp_(m.c.weight, 0.1)
    return m.c(x) + m.teacher(x)


def made_late(m: Any, x: Tensor) -> Tensor:
    if m.late is None:
        m.late = nn.Conv2d(4, 4, 1).double()
    return m.late(m.c(x))


def gradient_inside(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x if x.requires_grad else x.detach().requires_grad_()
        return x + torch.autograd.grad(torch.tanh(m.c(z)).sum(), z, create_graph=True)[0] * m.p


def lazy() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)).double()


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return net(nn.Tanh())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "state of a class": (lambda: net(Counts()), "the target computes something else each time"),
    "clamped": (lambda: net(runs(clamped)()), r"parameter '2\.p' of the target is written to in its forward pass"),
    "replaced": (lambda: net(runs(replaced)()), r"parameter '2\.p' of the target is written to in its forward pass"),
    "frozen and written to": (
        lambda: net(runs(follows, teacher)()),
        r"parameter '2\.teacher\.weight' of the target is frozen, but written to",
    ),
    "made late": (
        lambda: net(runs(made_late, lambda m: setattr(m, "late", None))()),
        r"parameter '2\.late\.bias' of the target is made in its forward pass: run the network",
    ),
    "third order": (
        lambda: net(runs(gradient_inside)()),
        "the target .* cannot be differentiated twice .* no third derivative",
    ),
    "saved output in place": (
        lambda: net(runs(lambda m, x: torch.tanh(m.c(x)).mul_(m.p))()),
        "the target cannot be differentiated: one of the variables",
    ),
    "lazy": (lazy, r"'1\.weight' of the target has no shape yet"),
    "scripted": (lambda: torch.jit.script(net(nn.Tanh())), "the target is a scripted module"),
    "scripted part": (lambda: net(torch.jit.script(nn.Conv2d(4, 4, 1))), "'2' of the target is a scripted module"),
    "inference mode": (made_in_inference_mode, r"'0\.weight' of the target was made in inference mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_sentence(name: str) -> None:
    build, message = REFUSED[name]
    target = build()
    before = None if name in ("lazy", "scripted", "scripted part") else state_of(target)
    with pytest.raises(L2TError, match=f"^{message}") as raised:
        engine(target)
    assert str(raised.value).count("\n") == 0
    assert before is None or state_of(target) == before


def test_images_that_do_not_fit_change_nothing() -> None:
    target = net(nn.Tanh())
    made = engine(target)
    made.step(*batch(0))
    before = state_of(target), copy.deepcopy(trained(made))
    bad = [
        batch(0, channels=4),
        (torch.randn(4, 3, 2, 2).double(), batch(0)[1]),
        batch(0, 1),
        (batch(0)[0].float(), batch(0)[1]),
    ]
    for x, y in bad:
        with pytest.raises(L2TError):
            made.step(x, y)
        assert state_of(target) == before[0]
        torch.testing.assert_close(trained(made), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), BatchNormAct2d(4), nn.SyncBatchNorm(4)])
def test_a_norm_over_the_batch_needs_two_images(norm: nn.Module) -> None:
    target = net(norm)
    target[1] = nn.Identity()
    made = engine(target)
    assert made.smallest_batch == 2
    with pytest.raises(L2TError, match="BatchNorm cannot train on a batch of one"):
        made.step(*batch(0, 1))
    target[2].eval()
    assert made.smallest_batch == 1
    made.step(*batch(0, 1))


def test_other_branches_in_training_and_evaluation() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(x) * m.p if m.training else F.relu(x)

    engine(net(runs(forward)())).step(*batch(0))


def test_sources_of_many_kinds() -> None:
    with torch.inference_mode():
        inferred = source()
    scripted = nn.Sequential(nn.Sequential(torch.jit.script(source())), nn.ReLU())
    frozen = nn.Sequential(runs(lambda m, x: torch.inference_mode()(m.own)(x), lambda m: setattr(m, "own", source()))())
    gradients = [
        engine(net(nn.Tanh()), source=one).meta_gradient(*batch(0)) for one in (inferred, scripted, frozen.double())
    ]
    assert all(g.isfinite().all() for found in gradients for g in found.values())


def test_thawed_and_frozen_parameters() -> None:
    target = net(nn.Tanh())
    target[0].bias.requires_grad_(False)
    made = engine(target)
    start = target[0].bias.clone()
    made.step(*batch(0))
    assert torch.equal(target[0].bias, start)
    for p, what in ((target[0].bias, "requires a gradient since"), (target[0].weight, "was frozen after")):
        p.requires_grad_(not p.requires_grad)
        with pytest.raises(L2TError, match=f"{what} the engine was made: make a new Engine"):
            made.step(*batch(0))
        p.requires_grad_(not p.requires_grad)
    made.step(*batch(0))
