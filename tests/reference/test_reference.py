"""The oracle against independent computations: an unrolled graph, finite differences, torch.optim, the formula."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from l2t_fast.errors import L2TError
from l2t_fast.reference import Reference
from tests.reference.shared import (
    BATCH,
    Batch,
    Params,
    assert_close,
    assert_equal_state,
    batch,
    build,
    flat,
    source_net,
    target_net,
)

pytestmark = pytest.mark.core


class Unrolled:
    """The same iteration as one differentiable function of φ: nothing is replayed, nothing changes in place."""

    def __init__(self, reference: Reference, what: str, where: str) -> None:
        self.reference, self.what, self.where = reference, what, where
        self.phi = {
            f"{part}.{name}": p.detach().clone().requires_grad_()
            for part, module in (("what", reference.what), ("where", reference.where))
            for name, p in module.named_parameters()
        }
        state = reference.state_dict()
        named = [("target", reference.target), ("projections", reference.projections)]
        self.theta = {f"{part}.{k}": p.detach().clone() for part, m in named for k, p in m.named_parameters()}
        for p in self.theta.values():
            p.requires_grad_()
        self.momentum = {k: state["momentum"][k] for k in self.theta}
        self.buffers = {k: b.clone() for k, b in reference.target.named_buffers()}

    def losses(self, theta: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        reference, taps = self.reference, {}
        h = x
        for name, child in reference.target.named_children():
            prefix = f"target.{name}."
            params = {k.removeprefix(prefix): p for k, p in theta.items() if k.startswith(prefix)}
            buffers = {k.removeprefix(f"{name}."): b for k, b in self.buffers.items() if k.startswith(f"{name}.")}
            h = functional_call(child, (params, buffers), (h,))
            taps[name] = h
        matching = torch.zeros((), dtype=x.dtype)
        for i, (s, m, n) in enumerate(reference.pairs):
            feature = x
            for child in list(reference.sources[s].children())[: m + 1]:
                feature = child(feature)
            pooled, c = feature.mean((2, 3)), feature.shape[1]
            t = taps[reference.target_layers[n]]
            feature = F.interpolate(feature, t.shape[2:], mode="bilinear")
            r = F.conv2d(t, theta[f"projections.{i}.weight"], theta[f"projections.{i}.bias"])
            w = torch.full_like(pooled, 1 / c)
            if self.what == "softmax":
                logits = pooled @ self.phi[f"what.{i}.weight"].T + self.phi[f"what.{i}.bias"]
                w = logits.exp() / logits.exp().sum(1, keepdim=True)
            weight = torch.ones(BATCH, dtype=x.dtype)
            if self.where == "softplus":
                weight = (10 * self.phi[f"where.{i}.a"]).exp().log1p() * weight
            elif self.where != "fixed":
                scaled = pooled / c if self.where == "relu-avg" else pooled
                head = (scaled @ self.phi[f"where.{i}.weight"].T + self.phi[f"where.{i}.bias"]).squeeze(1)
                weight = head.clamp(0, 6) if self.where == "relu6" else head.clamp(min=0)
            pixels = t.shape[2] * t.shape[3]
            matching = matching + torch.einsum("b,bc,bcij->", weight, w, (r - feature) ** 2) / (BATCH * pixels)
        return F.cross_entropy(h, y), reference.beta * matching

    def sgd(self, theta: Params, v: Params, loss: Tensor, second_order: bool) -> tuple[Params, Params]:
        group = self.reference.optimizer.param_groups[0]
        gradients = torch.autograd.grad(
            loss, list(theta.values()), create_graph=second_order, allow_unused=True, materialize_grads=True
        )
        new_theta, new_v = {}, {}
        for (k, p), gradient in zip(theta.items(), gradients, strict=True):
            g = gradient + group["weight_decay"] * p
            new_v[k] = group["momentum"] * v[k] + g
            new_theta[k] = p - group["lr"] * (g + group["momentum"] * new_v[k] if group["nesterov"] else new_v[k])
        return new_theta, new_v

    def meta_loss(self, batches: list[Batch], val: Batch, second_order: bool) -> Tensor:
        """L_meta; `batches` holds the one batch of scheme "transfer" or the T batches of scheme "simulation"."""
        theta, v = self.theta, self.momentum
        steps = [(data, "total") for data in batches]
        if self.reference.scheme == "transfer":
            steps = [(batches[0], "matching")] * self.reference.inner_steps + [(batches[0], "org")]
        for data, term in steps:
            if not second_order:
                theta = {k: p.detach().requires_grad_() for k, p in theta.items()}
            org, matching = self.losses(theta, *data)
            loss = {"matching": matching, "org": org, "total": org + matching}[term]
            theta, v = self.sgd(theta, v, loss, second_order)
        return self.losses(theta, *val)[0]

    def meta_gradient(self, batches: list[Batch], val: Batch) -> Params:
        gradient = torch.autograd.grad(
            self.meta_loss(batches, val, True), list(self.phi.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.phi, gradient, strict=True))


SGD = [
    {"momentum": 0.9},
    {"momentum": 0.8, "nesterov": True},
    {"momentum": 0.0},
]
SETTINGS = [
    *(
        {"scheme": scheme, "inner_steps": t, **sgd}
        for scheme, t, sgd in itertools.product(("transfer", "simulation"), (0, 1, 2, 3), SGD)
    ),
    *({"where": where, "two_sources": True} for where in ("relu6", "relu", "relu-avg", "softplus", "fixed")),
    {"what": "uniform", "two_sources": True, "scheme": "simulation"},
    {"dropout": True, "inner_steps": 3},
    {"dropout": True, "scheme": "simulation"},
    {"smooth": True},
]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: "-".join(map(str, case.values())))
def test_meta_gradient_equals_the_unrolled_computation(case: dict[str, Any]) -> None:
    reference = build(**case)
    simulation, steps = reference.scheme == "simulation", reference.inner_steps
    batches = [batch(seed) for seed in range(30, 30 + (max(steps, 1) if simulation else 1))]
    val = batch(40) if simulation else batches[0]
    unrolled = Unrolled(reference, case.get("what", "softmax"), case.get("where", "relu6"))
    before = reference.state_dict()

    torch.manual_seed(1)
    expected = unrolled.meta_gradient(batches[: steps if simulation else 1], val)
    torch.manual_seed(1)
    rng = torch.get_rng_state()
    xs, ys = map(list, zip(*batches, strict=True))
    actual = reference.meta_gradient(xs, ys, val) if simulation else reference.meta_gradient(*batches[0])

    assert_close(actual, expected, 1e-10)
    assert (flat(actual).norm() > 1e-5) == (steps > 0)
    assert_equal_state(reference.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_meta_gradient_equals_finite_differences(scheme: str) -> None:
    reference = build(smooth=True, where="softplus", scheme=scheme, nesterov=True)
    train, val = batch(30), batch(40)
    gradient = flat(reference.meta_gradient(*train, val=val))
    unrolled = Unrolled(reference, "softmax", "softplus")
    phi = {k: p.detach().clone() for k, p in unrolled.phi.items()}

    def meta_loss(offset: Tensor) -> Tensor:
        parts = offset.split([p.numel() for p in phi.values()])
        unrolled.phi = {k: p + d.view_as(p) for (k, p), d in zip(phi.items(), parts, strict=True)}
        return unrolled.meta_loss([train] * (1 if scheme == "transfer" else 2), val, second_order=False).detach()

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = F.normalize(torch.randn(len(gradient), generator=generator, dtype=torch.float64), dim=0)
        h = 1e-3
        near, far = (meta_loss(k * h * direction) - meta_loss(-k * h * direction) for k in (1, 2))
        difference = (8 * near - far) / (12 * h)  # central, fourth order
        assert torch.isclose(gradient @ direction, difference, rtol=1e-6, atol=0)


def test_meta_gradient_on_a_held_out_batch() -> None:
    reference = build()
    expected = Unrolled(reference, "softmax", "relu6").meta_gradient([batch(30)], batch(40))
    assert_close(reference.meta_gradient(*batch(30), val=batch(40)), expected, 1e-10)


@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
@pytest.mark.parametrize("sgd", SGD)
def test_step(scheme: str, sgd: dict[str, Any]) -> None:
    """Two iterations: θ as by torch.optim.SGD on L_total, buffers updated once, φ as by Adam on the meta-gradient."""
    reference = build(scheme=scheme, **sgd)
    reference.optimizer.param_groups[0]["lr"] = 0.05  # as a schedule does
    plain = copy.deepcopy(reference)
    adam = torch.optim.Adam(plain.phi.values(), lr=1e-4, weight_decay=1e-4)
    adam.load_state_dict(copy.deepcopy(reference.meta_optimizer.state_dict()))  # type: ignore[union-attr]
    for seed in (30, 31):
        (x, y), val = batch(seed), batch(40)
        metrics = reference.step(x, y, val)

        org, matching = Unrolled(plain, "softmax", "relu6").losses(dict(plain.theta), x, y)
        assert torch.isclose(metrics["loss"], org, rtol=1e-12)
        assert torch.isclose(metrics["matching_loss"], matching, rtol=1e-12)
        plain.optimizer.zero_grad()
        (F.cross_entropy(plain.target(x), y) + plain.matching_loss(x, plain.beta)).backward()
        plain.optimizer.step()
        # That made two forwards: its running statistics are not the ones to compare.
        for (k, actual), p in zip(reference.theta.items(), plain.theta.values(), strict=True):
            assert torch.allclose(actual, p, rtol=1e-12, atol=1e-15), k
        assert_close(reference.state_dict()["momentum"], plain.state_dict()["momentum"], 1e-12)

        meta_loss = Unrolled(plain, "softmax", "relu6").meta_loss([(x, y)] * (1 + (scheme == "simulation")), val, False)
        assert torch.isclose(metrics["meta_loss"], meta_loss, rtol=1e-12)
        for k, g in plain.meta_gradient(x, y, val).items():
            plain.phi[k].grad = g
        adam.step()
        for k, p in plain.phi.items():
            assert torch.allclose(reference.phi[k], p, rtol=1e-12, atol=1e-14), k


def test_running_statistics_change_once_in_an_iteration() -> None:
    reference = build()
    once = copy.deepcopy(reference.target)
    x, y = batch(30)
    once(x)
    reference.step(x, y)
    for (k, actual), expected in zip(reference.target.named_buffers(), once.buffers(), strict=True):
        assert torch.equal(actual, expected), k
    assert reference.target[1][1].num_batches_tracked == 3  # type: ignore[index, union-attr]


@pytest.mark.parametrize("options", [{"what": "uniform", "where": "fixed"}, {"pairs": []}])
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_without_meta_networks_only_the_real_step_is_made(options: dict[str, Any], scheme: str) -> None:
    reference = build(**options, scheme=scheme)
    x, y = batch(30)
    assert reference.meta_gradient(x, y) == {}
    plain = copy.deepcopy(reference)
    metrics = reference.step(x, y)
    plain.optimizer.zero_grad()
    loss = F.cross_entropy(plain.target(x), y) + plain.matching_loss(x, 0.5)
    loss.backward()
    plain.optimizer.step()
    assert metrics.keys() == {"loss", "matching_loss"}
    assert torch.isclose(metrics["loss"] + metrics["matching_loss"], loss, rtol=1e-12)
    for p, expected in zip(reference.theta.values(), plain.theta.values(), strict=True):
        assert torch.allclose(p, expected, rtol=1e-12, atol=1e-15)


def test_weight_decay_and_momentum_reach_parameters_without_gradient() -> None:
    torch.manual_seed(0)
    target = target_net().double()
    target.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    x, y = batch(0)
    reference = Reference(
        source_net((1, 2)).double(), target, source_layers=["1"], target_layers=["4"], pairs=[(0, 0, 0)],
        example=x, lr=0.1, momentum=0.5, weight_decay=0.2,
    )  # fmt: skip
    reference.step(x, y)
    assert torch.allclose(target.unused, torch.full_like(target.unused, 1 - 0.1 * 0.2), rtol=1e-14)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_source_runs_as_often_as_in_the_official_code(steps: int) -> None:
    reference = build(inner_steps=steps)
    calls: list[int] = []
    reference.sources[0].register_forward_hook(lambda *_: calls.append(1))
    reference.step(*batch(30))
    assert len(calls) == 2 * steps + 1


def test_matching_loss_at_initialisation() -> None:
    torch.manual_seed(0)
    source, target, (x, _) = source_net((1, 2)).double(), target_net().double(), batch(0)
    reference = Reference(
        source, target, source_layers=["0", "1"], target_layers=["1", "4"], pairs=[(0, 1, 0)], example=x
    )
    s = source(x)  # [B, 5, 4, 4]
    t = target[:2](x)  # [B, 6, 4, 4]
    r, g = reference.projections[0], reference.where[0]
    expected = torch.zeros((), dtype=x.dtype)
    for b in range(BATCH):
        weight = min(max((g.weight[0] @ s[b].mean((1, 2)) + g.bias[0]).item(), 0.0), 6.0)
        assert 0 < weight < 6
        for c, i, j in itertools.product(range(5), range(4), range(4)):
            d = r.weight[c, :, 0, 0] @ t[b, :, i, j] + r.bias[c] - s[b, c, i, j]
            expected += weight * d**2 / (5 * 16 * BATCH)
    assert torch.isclose(reference.matching_loss(x), expected, rtol=1e-12)
    assert torch.isclose(reference.matching_loss(x, beta=0.25), expected / 4, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": [(0, 2, 0)]}, "out of range"),
        ({"target_layers": ["nine"]}, "No layer 'nine'"),
        ({"where": "relu7"}, "Unknown option 'relu7'"),
        ({"source_layers": ["0.1", "1"]}, "overwritten in place"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"source_layers": ["0", "1"], "target_layers": ["1"], "pairs": [(0, 0, 0)]}
    with pytest.raises(L2TError, match=message):
        Reference(source_net((1, 2)), target_net(), example=batch(0)[0].float(), **{**good, **options})


def test_simulation_needs_its_batches() -> None:
    reference = build(scheme="simulation")
    x, y = batch(30)
    with pytest.raises(L2TError, match="held-out"):
        reference.step(x, y)
    with pytest.raises(L2TError, match=r"needs 2 batch"):
        reference.step([x] * 3, [y] * 3, val=(x, y))
