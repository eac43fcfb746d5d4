"""θ's optimizers, groups of parameters and clipping inside the simulated steps, against the oracle in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2t_fast import SGD, AdamW, Engine, L2TError
from l2t_fast.engine.capture import WARM_UP
from l2t_fast.learner.learner import L2T
from l2t_fast.reference import Reference
from tests.engine.shared import (
    X,
    Y,
    assert_close,
    assert_identical,
    flat,
    randomise,
    small_batch,
    small_learner,
    small_net,
    source_net,
)
from tests.engine.test_capture import taped  # noqa: F401
from tests.shared import engine as make_engine
from tests.shared import same

pytestmark = pytest.mark.core

VAL = small_batch(9, 8)


def groups_of(theta: dict[str, Any], lr: float, decay: float) -> list[dict[str, Any]]:
    """No decay for vectors, a slower backbone."""
    vectors = [p for p in theta.values() if p.dim() < 2]
    backbone = [p for name, p in theta.items() if name.startswith("target.0.") and p.dim() >= 2]
    return [{"params": vectors, "weight_decay": 0.0}, {"params": backbone, "lr": lr / 10, "weight_decay": decay}]


def torch_optimizer(rule: SGD | AdamW, lr: float, grouped: bool) -> Callable[[dict[str, nn.Parameter]], Any]:
    def make(theta: dict[str, nn.Parameter]) -> Any:
        groups = groups_of(theta, lr, 0.03) if grouped else []
        taken = {id(p) for group in groups for p in group["params"]}
        groups.append({"params": [p for p in theta.values() if id(p) not in taken]})
        if isinstance(rule, SGD):
            return torch.optim.SGD(groups, lr, rule.momentum, 0, rule.weight_decay, rule.nesterov)
        return torch.optim.AdamW(groups, lr, rule.betas, rule.eps, rule.weight_decay)

    return make


def both(
    rule: SGD | AdamW, lr: float, grouped: bool, max_norm: float | None, **options: Any
) -> tuple[Engine, Reference]:
    torch.manual_seed(0)
    source, target = source_net((2, 2)), small_net(nn.Softplus())
    networks: dict[str, Any] = {"source_layers": ["0", "1"], "target_layers": ["0", "2"], "example": X}
    learner = L2T(source, copy.deepcopy(target), **networks)
    randomise(learner)
    shared: dict[str, Any] = {"max_grad_norm": max_norm, "meta_lr": 1e-3, "scheme": options.get("scheme", "transfer")}
    theta = {
        **{f"target.{name}": p for name, p in learner.target.named_parameters()},
        **{f"projections.{name}": p for name, p in learner.projections.named_parameters()},
    }
    groups = groups_of(theta, lr, 0.03) if grouped else []
    engine = Engine(learner, lr=lr, optimizer=rule, groups=groups, **shared, memory=options.get("memory", "save"))
    reference = Reference(
        copy.deepcopy(source), target, **networks, pairs=learner.pairs, **shared,
        optimizer=torch_optimizer(rule, lr, grouped),
    )  # fmt: skip
    state = engine.state_dict()
    with torch.no_grad():
        for ours, theirs in ((reference.theta, state["theta"]), (reference.phi, state["phi"])):
            for name, p in ours.items():
                p.copy_(theirs[name])
    return engine, reference


SETTINGS: list[tuple[Any, ...]] = [  # rule, α, groups, C, the scheme, the memory
    (AdamW(), 3e-3, False, None, "transfer", "save"),
    (AdamW((0.8, 0.9), 1e-3, 0.1), 1e-2, False, None, "simulation", "recompute"),
    (AdamW(eps=1e-4), 3e-3, True, 0.5, "transfer", "recompute"),
    (SGD(), 0.05, True, None, "transfer", "recompute"),
    (SGD(0.8, 1e-2, nesterov=True), 0.05, True, 0.5, "simulation", "save"),
    (SGD(0.0, 0.0), 0.05, False, 0.2, "transfer", "save"),
]


@pytest.mark.parametrize(("rule", "lr", "grouped", "max_norm", "scheme", "memory"), SETTINGS, ids=str)
def test_the_meta_gradient_and_the_steps_equal_the_reference(
    rule: SGD | AdamW, lr: float, grouped: bool, max_norm: float | None, scheme: Any, memory: Any
) -> None:
    engine, reference = both(rule, lr, grouped, max_norm, scheme=scheme, memory=memory)
    for seed in range(3):
        x, y = small_batch(seed, 8)
        gradient = engine.meta_gradient(x, y, VAL)
        assert_close(gradient, reference.meta_gradient(x, y, VAL), 1e-9)
        assert flat(gradient).norm() > 0
        expected, metrics = reference.step(x, y, VAL), engine.step(x, y, VAL)
        assert_close({k: metrics[k] for k in expected}, expected, 1e-9)
    state = engine.state_dict()
    assert_close(state["theta"], {k: p.detach() for k, p in reference.theta.items()}, 1e-9)
    assert_close(state["phi"], {k: p.detach() for k, p in reference.phi.items()}, 1e-9)
    for part in ("momentum",) if isinstance(rule, SGD) else ("exp_avg", "exp_avg_sq"):
        theirs = {name: reference.optimizer.state[p].get(f"{part}_buffer" if part == "momentum" else part)
                  for name, p in reference.theta.items()}  # fmt: skip
        if isinstance(rule, AdamW) or rule.momentum:
            assert_close(state[part], theirs, 1e-9)


def test_clipping_is_active_in_these_tests() -> None:
    wide, _ = both(SGD(), 0.05, False, 1e6)
    for rule, lr, grouped, max_norm, *_ in SETTINGS:
        if max_norm is not None:
            narrow, _ = both(rule, lr, grouped, max_norm)
            other, _ = both(rule, lr, grouped, 1e6)
            pair = narrow.meta_gradient(X, Y), other.meta_gradient(X, Y)
            assert (flat(pair[0]) - flat(pair[1])).norm() > 1e-3 * flat(pair[1]).norm()
    assert_close(wide.meta_gradient(X, Y), both(SGD(), 0.05, False, None)[0].meta_gradient(X, Y), 1e-12)


def test_a_state_with_moments_goes_on_bit_exactly_and_foreign_ones_are_refused() -> None:
    def made(**options: Any) -> Engine:
        learner = small_learner(pairs="single")
        options = {
            "optimizer": AdamW(),
            "groups": [{"params": learner.projections.parameters(), "lr": 0.01}],
            **options,
        }
        return Engine(learner, lr=0.02, inner_steps=1, **options)

    first, other = made(), made()
    for seed in range(2):
        first.step(*small_batch(seed, 8))
    first.optimizer.param_groups[1]["lr"] = 0.005
    state = copy.deepcopy(first.state_dict())
    assert state["lr"] == [0.02, 0.005]
    assert state["steps"]["steps"] == 2
    other.load_state_dict(state)
    assert_identical(other.state_dict(), state)
    assert_identical(first.step(X, Y), other.step(X, Y))
    assert_identical(first.state_dict(), other.state_dict())
    for foreign in (made(optimizer=SGD()), made(groups=[])):
        before = copy.deepcopy(foreign.state_dict())
        with pytest.raises(L2TError, match=r"this state (does not fit the learner: it is of another optimizer|is not)"):
            foreign.load_state_dict(state)
        assert_identical(foreign.state_dict(), before)


def test_moments_and_learning_rates_live_where_captured_iterations_read_them(
    taped: Callable[..., Engine],  # noqa: F811
) -> None:
    def made(make: Callable[..., Engine]) -> Engine:
        subject = small_learner(pairs="single")
        groups = [{"params": subject.projections.parameters(), "lr": 0.01}]
        return make(subject=subject, inner_steps=1, optimizer=AdamW(), groups=groups, max_grad_norm=0.5)

    eager, graph = made(make_engine), made(taped)
    eager.trained.adam.param_groups[0]["fused"] = True  # type: ignore[union-attr]
    for i in range(WARM_UP + 4):
        for subject in (eager, graph):
            subject.lr = 0.02 / (1 + i)
            subject.optimizer.param_groups[1]["lr"] = 0.01 / (1 + i)
        same(graph.step(*small_batch(i, 8)), eager.step(*small_batch(i, 8)))
    assert_identical(graph.state_dict(), eager.state_dict())


@pytest.mark.parametrize("rule", [SGD(), AdamW()], ids=str)
def test_in_bfloat16_parameters_and_moments_stay_float32(rule: SGD | AdamW) -> None:
    """With groups and clipping; the meta-gradient points where that of float32 does."""
    gradients = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        networks = source_net((2, 2)).float(), small_net(nn.Softplus()).float()
        learner = L2T(*networks, source_layers=["1"], target_layers=["2"], example=X.float())
        groups = [{"params": learner.projections.parameters(), "lr": 1e-3}]
        options: dict[str, Any] = {"groups": groups, "max_grad_norm": 0.5, "precision": precision}
        engine = Engine(learner, lr=5e-3, optimizer=rule, **options)
        engine.step(X.float(), Y)
        gradients.append(flat(engine.meta_gradient(X.float(), Y)))
        state = engine.state_dict()
        parts = [part for part in state.keys() - {"adam", "lr", "buffers"} for part in state[part].values()]
        assert {t.dtype for t in parts} == {torch.float32}
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


def test_the_plain_step_stays_one_launch() -> None:
    """SGD alone, without groups and clipping, keeps nothing of a step and makes nothing beside it."""
    engine = Engine(small_learner())
    theta, state = [p.detach() for p in engine.trained.theta.values()], engine.trained.row()
    assert engine.trained.update.step(theta, state, [None] * len(theta))[2] is None
    assert len(state) == len(theta)


def parameter(learner: L2T) -> Tensor:
    return next(learner.target.parameters())


REFUSED: list[tuple[Callable[[L2T], dict[str, Any]], str]] = [
    (lambda t: {"optimizer": "adamw"}, r"optimizer='adamw' is not to be had: use l2t_fast.SGD"),
    (lambda t: {"optimizer": AdamW((0.9, 1.0))}, r"beta2=1.0 is not to be had"),
    (lambda t: {"optimizer": AdamW(eps=0.0)}, r"eps=0.0 is not to be had"),
    (lambda t: {"optimizer": SGD(0.0, nesterov=True)}, r"nesterov=True needs momentum"),
    (lambda t: {"optimizer": AdamW(), "momentum": 0.8}, r"optimizer= has its own momentum"),
    (lambda t: {"max_grad_norm": 0.0}, r"max_grad_norm=0.0 is not to be had"),
    (lambda t: {"groups": [{"lr": 0.1}]}, r"group 0 of the parameters is .*: give"),
    (lambda t: {"groups": [{"params": [parameter(t)], "momentum": 0.1}]}, r"group 0 .* has 'momentum': only lr and"),
    (lambda t: {"groups": [{"params": [parameter(t)], "lr": -1}]}, r"lr=-1 is not to be had"),
    (lambda t: {"groups": [{"params": ["0.weight"]}]}, r"has '0.weight' among its params: give parameters"),
    (lambda t: {"groups": [{"params": 3}]}, r"params=3: give a list of parameters"),
    (lambda t: {"groups": [{"params": [parameter(t)]}] * 2}, r"group 1 .* stands in a group already"),
    (lambda t: {"groups": [{"params": t.what.parameters()}]}, r"that the engine does not train.*meta_lr"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_no_optimizer(options: Callable[[L2T], dict[str, Any]], message: str) -> None:
    learner = small_learner()
    with pytest.raises(L2TError, match=message):
        Engine(learner, **options(learner))
