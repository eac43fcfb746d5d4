"""The engine against the oracle, finite differences and torch.optim, in float64 on tiny networks."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast import L2T, Engine
from l2t_fast.engine import bilevel
from l2t_fast.engine import inner_step as inner
from l2t_fast.kernels.layers import batch_norm
from l2t_fast.kernels.matching import ops, triton_launch
from l2t_fast.kernels.sgd import step as sgd
from l2t_fast.kernels.sgd.rule import SGD
from l2t_fast.kernels.sgd.step import sgd_step
from tests.engine.shared import (
    Tensors,
    X,
    Y,
    assert_close,
    assert_identical,
    beside_the_reference,
    case_id,
    flat,
    flops,
    frozen,
    resnet,
    small_batch,
    small_learner,
    small_net,
    snapshot,
    source_net,
    vgg,
    with_a_sum,
    with_dropout,
)

pytestmark = pytest.mark.core


SGD_RULES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0, "memory": "recompute"},
    {"weight_decay": 0.0, "nesterov": True},
]
WHERE = ("relu6", "relu", "relu-avg", "softplus", "fixed")
SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    *(
        (net, {"scheme": scheme, "inner_steps": t, "memory": ("save", "recompute")[i % 2]})
        for i, (net, scheme, t) in enumerate(itertools.product((resnet, vgg), ("transfer", "simulation"), (0, 1, 2, 5)))
    ),
    *((resnet, {"scheme": scheme, **rule}) for scheme in ("transfer", "simulation") for rule in SGD_RULES),
    *((vgg, {"where": where, "two_sources": False, "memory": "recompute"}) for where in WHERE),
    (vgg, {"what": "uniform", "beta": 2.0}),
    (resnet, {"pairs": [(1, 1, 0), (0, 0, 2)], "what": "uniform", "where": "softplus"}),
    (resnet, {"pairs": "one-to-one", "scheme": "simulation", "batches": 1}),
    (resnet, {"pairs": "single", "inner_steps": 3, "val": True}),
    (with_a_sum, {"inner_steps": 3}),
    (frozen, {"memory": "recompute"}),
    (frozen, {"scheme": "simulation"}),
    *(
        (with_dropout, {"inner_steps": 3, "scheme": scheme, "memory": memory})
        for scheme in ("transfer", "simulation")
        for memory in ("save", "recompute")
    ),
]


@pytest.mark.parametrize(("net", "case"), SETTINGS, ids=case_id)
def test_meta_gradient_equals_the_reference(net: Any, case: dict[str, Any]) -> None:
    options = {k: v for k, v in case.items() if k not in ("batches", "val")}
    torch.manual_seed(0)
    size = 32 if net is vgg else 16
    engine, reference = beside_the_reference(*net(), **options, size=size)
    simulation, steps = engine.scheme == "simulation", engine.inner_steps
    x, y = small_batch(30, size)
    xs, ys = map(list, zip(*(small_batch(seed, size) for seed in range(30, 30 + max(steps, 1))), strict=True))
    several = simulation and case.get("batches") != 1
    arguments = (
        xs if several else x,
        ys if several else y,
        small_batch(40, size) if simulation or "val" in case else None,
    )

    before = snapshot(engine)
    torch.manual_seed(1)
    expected = reference.meta_gradient(*arguments)
    torch.manual_seed(1)
    before["random"] = torch.get_rng_state()
    actual = engine.meta_gradient(*arguments)

    assert_close(actual, expected)
    assert (flat(actual).norm() > 1e-6) == (steps > 0)
    assert_identical(snapshot(engine), before)


@pytest.mark.parametrize("case", [{}, {"scheme": "simulation", "nesterov": True, "memory": "recompute"}], ids=case_id)
def test_meta_gradient_equals_finite_differences(case: dict[str, Any]) -> None:
    learner = small_learner(small_net(nn.Softplus()), where="softplus")
    engine = Engine(learner, weight_decay=1e-2, **case)
    train, val = small_batch(30, 8), small_batch(40, 8)
    for seed in range(2):
        engine.step(*small_batch(seed, 8), val=val)
    gradient = engine.meta_gradient(*train, val)
    phi = engine.state_dict()["phi"]
    start = {name: p.clone() for name, p in phi.items()}

    @torch.no_grad()
    def meta_loss(offset: Tensors) -> Tensor:
        """L_meta by the first-order rule alone, one step after the other."""
        for name, p in phi.items():
            p.copy_(start[name] + offset[name])
        S = learner.source_features(train[0])
        data = inner.StepInput(*train, *learner.matching_sources(S, True), learner.coefficients(S, engine.beta)[0])
        theta = {name: p.detach() for name, p in inner.parameters(learner).items()}
        momentum = engine.state_dict()["momentum"]
        rule, lr = SGD(0.9, 1e-2, bool(case)), torch.tensor(engine.lr)
        kinds = [(True, True)] * 2 if case else [(False, True), (False, True), (True, False)]
        for task, matching in kinds:
            g = inner.gradient(learner, theta, data, task=task, matching=matching).theta
            new = sgd_step(list(theta.values()), list(momentum.values()), [g.get(name) for name in theta], lr, rule)
            theta, momentum = (dict(zip(theta, tensors, strict=True)) for tensors in new)
        return inner.task_loss(learner, theta, *val)

    torch.manual_seed(1)
    for _ in range(3):
        direction = {name: torch.randn_like(p) for name, p in phi.items()}
        h = 1e-3 / flat(direction).norm().item()
        near, far = (
            meta_loss({n: k * h * d for n, d in direction.items()})
            - meta_loss({n: -k * h * d for n, d in direction.items()})
            for k in (1, 2)
        )
        difference = (8 * near - far) / (12 * h)  # central, fourth order
        assert torch.isclose(flat(gradient) @ flat(direction), difference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("net", [resnet, with_dropout], ids=case_id)
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_three_steps_equal_those_of_the_reference(net: Any, scheme: str, memory: bilevel.Memory) -> None:
    torch.manual_seed(0)
    engine, reference = beside_the_reference(
        *net(), scheme=scheme, memory=memory, two_sources=False, meta_lr=1e-3, nesterov=True, size=16
    )
    for i, lr in enumerate((0.05, 0.01, 0.02)):  # as a schedule does
        engine.lr = reference.optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(i)
        expected = reference.step(*small_batch(30 + i, 16), val=small_batch(40, 16))
        torch.manual_seed(i)
        metrics = engine.step(*small_batch(30 + i, 16), val=small_batch(40, 16))
        assert_close({k: metrics[k] for k in expected}, expected)
        state, theirs = engine.state_dict(), reference.state_dict()
        assert_close(state["theta"], {k: p.detach() for k, p in reference.theta.items()})
        assert_close(state["phi"], {k: p.detach() for k, p in reference.phi.items()})
        assert_close(state["momentum"], theirs["momentum"])
        assert_close(state["buffers"], dict(reference.target.named_buffers()))
        counts = [b.item() for name, b in state["buffers"].items() if name.endswith("num_batches_tracked")]
        assert counts == [3 + i + 1] * len(counts) != []


def test_the_networks_given_are_trained_in_place_and_the_sources_are_not() -> None:
    torch.manual_seed(0)
    source, target = source_net((2, 2)), small_net()
    before = [copy.deepcopy(network.state_dict()) for network in (source, target)]
    learner = L2T(source, target, source_layers=["1"], target_layers=["2"], example=small_batch(0, 8)[0])
    Engine(learner).step(*small_batch(0, 8))
    assert_identical(source.state_dict(), before[0])
    assert all(not torch.equal(p, before[1][name]) for name, p in target.state_dict().items())
    assert not any(m.training for m in source.modules())
    assert not any(p.requires_grad for p in source.parameters())


def test_meta_gradient_leaves_a_target_in_evaluation_mode_there() -> None:
    target = small_net()
    engine = Engine(small_learner(target))
    for training in (False, True):
        target.train(training)
        target[0].train(not training)  # type: ignore[index]
        modes = [m.training for m in target.modules()]
        engine.meta_gradient(*small_batch(0, 8))
        assert [m.training for m in target.modules()] == modes


@pytest.mark.parametrize("rule", [{"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.0}])
def test_without_pairs_it_is_plain_training(rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    target = small_net()
    plain = copy.deepcopy(target)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, weight_decay=1e-2, **rule)
    engine = Engine(small_learner(target, pairs=[]), lr=0.1, weight_decay=1e-2, **rule)
    for seed in range(3):
        x, y = small_batch(seed, 8)
        metrics = engine.step(x, y)
        logits = plain(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert metrics.keys() == {"loss", "accuracy"}
        assert torch.isclose(metrics["loss"], loss, rtol=1e-12)
        assert metrics["accuracy"] == (logits.argmax(1) == y).double().mean()
    assert_close(dict(target.named_parameters()), dict(plain.named_parameters()), 1e-12)
    assert_close(dict(target.named_buffers()), dict(plain.named_buffers()), 1e-12)


@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
@pytest.mark.parametrize("options", [{"what": "uniform", "where": "fixed"}, {"pairs": []}], ids=case_id)
def test_without_meta_parameters_there_is_no_meta_gradient(options: dict[str, Any], scheme: bilevel.Scheme) -> None:
    engine = Engine(small_learner(**options), scheme=scheme)
    x, y = small_batch(0, 8)
    assert engine.meta_gradient(x, y) == {}
    assert "meta_loss" not in engine.step(x, y)
    counted = flops(lambda: engine.step(x, y))
    target = flops(lambda: F.cross_entropy(engine.learner.target_outputs(x)[0], y).backward())
    learner = engine.learner
    sources = flops(lambda: learner.source_features(x)) if learner.pairs else 0
    product = flops(lambda: learner.matching_loss(x)) - flops(lambda: learner.target_outputs(x)) - sources  # r T
    assert counted == target + sources + 3 * product  # nothing is simulated


@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_metrics(scheme: bilevel.Scheme) -> None:
    learner = small_learner()
    engine = Engine(learner, beta=0.7, scheme=scheme)
    (x, y), val = small_batch(0, 8), small_batch(1, 8)
    before = copy.deepcopy(learner).train()  # a copied fx graph forgets the sources' evaluation mode
    logits = before.target_outputs(x)[0]
    metrics = engine.step(x, y, val)
    pairs = len(learner.pairs)
    assert {name: tuple(value.shape) for name, value in metrics.items()} == {
        **dict.fromkeys(("loss", "accuracy", "matching_loss", "meta_loss"), ()),
        **dict.fromkeys(("pair_losses", "pair_weights"), (pairs,)),
    }
    assert not any(value.requires_grad for value in metrics.values())
    assert torch.isclose(metrics["loss"], F.cross_entropy(logits, y), rtol=1e-12)
    assert metrics["accuracy"] == (logits.argmax(1) == y).double().mean()
    assert torch.isclose(metrics["matching_loss"], 0.7 * before.matching_loss(x), rtol=1e-12)
    w, lam = before.weights(before.source_features(x))
    assert torch.allclose(metrics["pair_weights"], torch.stack([weight.mean() for weight in lam]), rtol=1e-12)
    S, T = before.source_features(x), before.target_outputs(x)[1]
    for p, (_, m, n) in enumerate(learner.pairs):
        d = before.projections[p](T[n]) - F.interpolate(S[m], T[n].shape[2:], mode="bilinear")
        loss = 0.7 * (lam[p][:, None] * w[p] * d.square().mean((2, 3))).sum(1).mean()
        assert torch.isclose(metrics["pair_losses"][p], loss, rtol=1e-12)


def test_a_learning_rate_of_zero_leaves_theta_as_it_is() -> None:
    engine = Engine(small_learner(), lr=0.1)
    engine.lr = 0.0
    before = copy.deepcopy(engine.state_dict())
    engine.step(*small_batch(0, 8))
    assert_identical(engine.state_dict()["theta"], before["theta"])
    assert flat(engine.state_dict()["momentum"]).norm() > 0
    assert flat(engine.meta_gradient(*small_batch(0, 8))).norm() == 0  # no simulated step moves θ either


@torch.no_grad()
def test_it_works_where_gradients_are_switched_off() -> None:
    engine = Engine(small_learner())
    with torch.enable_grad():
        expected = engine.meta_gradient(X, Y)
    assert_identical(engine.meta_gradient(X, Y), expected)
    assert engine.step(X, Y)["meta_loss"].isfinite()


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter runs Triton in float64")
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_triton_kernels_change_nothing(memory: bilevel.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators get the source features unresized, here of half and twice the target's resolution too."""

    def trained() -> tuple[Tensors, dict[str, Any]]:
        engine = Engine(small_learner(), memory=memory)
        engine.step(X, Y)
        return engine.meta_gradient(X, Y), snapshot(engine)

    theirs, after = trained()
    monkeypatch.setattr(ops, "implementation", lambda feature: triton_launch)
    monkeypatch.setattr(batch_norm, "fused", lambda x: True)
    monkeypatch.setattr(sgd, "fused", lambda tensors: True)
    learner = small_learner()
    S = learner.source_features(X)
    assert not learner.resizes(X)
    assert [x.data_ptr() for x in learner.matching_sources(S, False)[0]] == [x.data_ptr() for x in S]
    ours, ours_after = trained()
    assert_close(ours, theirs)
    assert_close(ours_after["parameters"], after["parameters"])
