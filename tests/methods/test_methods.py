"""Every method: its loss against an independent few-line version, in every mode, and what it is made of."""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.methods import METHODS, find_method
from l2t_fast.networks.architectures import build_model
from l2t_fast.reference import forward_with_features
from tests.engine.test_capture import WARM_UP, fused, taped  # noqa: F401
from tests.engine.test_modes import aot_eager  # noqa: F401
from tests.methods.shared import LAYERS, ONE_TO_ONE, SOURCES, TARGET_LAYERS, learner, networks
from tests.shared import batch, engine, error, everything, same

pytestmark = pytest.mark.core


# The few-line versions: teachers, target, what the learner drew at random, x -> what is added to the cross entropy.


def plain_lwf(teachers: Any, target: nn.Module, subject: L2T, x: Tensor, weight: float = 1, tau: float = 2) -> Tensor:
    hidden = target.avgpool(target.features(x)).flatten(1)
    total = x.new_zeros(())
    for teacher, head in zip(teachers, subject.terms[0].heads, strict=True):
        p = (teacher(x) / tau).exp() / (teacher(x) / tau).exp().sum(1, keepdim=True)
        q = hidden @ head.weight.T + head.bias
        total = total - weight * (p * F.log_softmax(q / tau, 1)).sum() / len(x)
    return total


def plain_at(teachers: Any, target: nn.Module, subject: L2T, x: Tensor, weight: float = 1000) -> Tensor:
    features = forward_with_features(target, TARGET_LAYERS, x)[1]
    total = x.new_zeros(())
    for teacher in teachers:
        theirs = forward_with_features(teacher, LAYERS["resnet8"], x)[1]
        for m, n in ONE_TO_ONE:
            qs, qt = ((f**2).mean(1).reshape(len(x), -1) for f in (theirs[m], features[n]))
            qs, qt = (q / q.pow(2).sum(1, keepdim=True).sqrt() for q in (qs, qt))
            total = total + weight * ((qs - qt) ** 2).mean()
    return total


def plain_jacobian(teachers: Any, target: nn.Module, subject: L2T, x: Tensor, weight: float = 1) -> Tensor:
    total = x.new_zeros(())
    for teacher in teachers:
        both, places = [], None
        for network, layers, deepest in ((teacher, LAYERS["resnet8"], 2), (target, TARGET_LAYERS, 2)):
            z = x.clone().requires_grad_()
            A = (forward_with_features(network, layers, z)[1][deepest] ** 2).mean(1).reshape(len(x), -1)
            places = A.argmax(1) if places is None else places
            largest = torch.stack([row[i] for row, i in zip(A, places, strict=True)])
            (J,) = torch.autograd.grad(largest.sum(), z, create_graph=network is target)
            both.append(J.reshape(len(x), -1) / J.reshape(len(x), -1).norm(dim=1, keepdim=True))
        total = total + weight * ((both[0] - both[1]) ** 2).sum(1).mean()
    return total


def plain_matching(pairs: Sequence[tuple[int, int]], beta: float = 0.5) -> Callable[..., Tensor]:
    def loss(teachers: Any, target: nn.Module, subject: L2T, x: Tensor) -> Tensor:
        features = forward_with_features(target, TARGET_LAYERS, x)[1]
        total, projections = x.new_zeros(()), iter(subject.projections)
        for teacher in teachers:
            theirs = forward_with_features(teacher, LAYERS["resnet8"], x)[1]
            for m, n in pairs:
                S = F.interpolate(theirs[m], size=features[n].shape[2:], mode="bilinear")
                total = total + beta * F.mse_loss(next(projections)(features[n]), S)
        return total

    return loss


# Before φ has learned anything w is uniform, so that the learned methods start as feature matching; λ of l2t-ww is in
# tests/reference and tests/engine/test_engine.py.
PLAIN: dict[str, Callable[..., Tensor]] = {
    "scratch": lambda teachers, target, subject, x: x.new_zeros(()),
    "finetune": lambda teachers, target, subject, x: x.new_zeros(()),
    "lwf": plain_lwf,
    "at": plain_at,
    "lwf+at": lambda *arguments: plain_lwf(*arguments) + plain_at(*arguments),
    "jacobian": plain_jacobian,
    "fm-single": plain_matching([(2, 4)]),
    "fm-one-to-one": plain_matching(ONE_TO_ONE),
    "l2t-w-single": plain_matching([(2, 4)]),
    "l2t-w-one-to-one": plain_matching(ONE_TO_ONE),
}


@torch.no_grad()
def copied(subject: L2T) -> L2T:
    """What the learner drew at random, as it is before a step."""
    return copy.deepcopy(subject)


@pytest.mark.parametrize("sources", [("resnet8",), ("resnet8", "resnet14")], ids=["one source", "two"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_step_descends_on_the_loss_of_the_paper(name: str, sources: tuple[str, ...]) -> None:
    """θ after one step of SGD, against plain autograd of a few-line version."""
    subject, (teachers, target) = learner(name, sources), networks(sources)
    parts = copied(subject).requires_grad_()
    x, y = batch(0)
    target.train()
    loss = F.cross_entropy(target(x), y) + PLAIN[name](teachers, target, parts, x)
    loss.backward()
    grads = {f"target.{n}": p.grad for n, p in target.named_parameters()}
    grads |= {f"projections.{n}": p.grad for n, p in parts.projections.named_parameters()}
    grads |= {f"terms.{n}": p.grad for n, p in parts.terms.named_parameters()}

    e = engine(subject, lr=0.5, momentum=0, weight_decay=0)
    before = {n: p.clone() for n, p in e.state_dict()["theta"].items()}
    metrics = e.step(x, y)
    after = e.state_dict()["theta"]
    assert after.keys() == grads.keys()
    assert error({n: before[n] - after[n] for n in after}, {n: 0.5 * g for n, g in grads.items()}) < 1e-9
    added = sum(value for key, value in metrics.items() if key.endswith("_loss") and key != "meta_loss")
    assert abs(metrics["loss"] + added - loss) < 1e-9
    assert ("meta_loss" in metrics) == find_method(name).learns_weights == name.startswith("l2t")


TERMS = ["lwf+at", "jacobian"]


@pytest.mark.parametrize("name", TERMS)
def test_terms_in_compiled_steps(name: str, aot_eager: None) -> None:  # noqa: F811
    compiled, eager = (engine(learner(name, tuple(SOURCES)), mode=mode) for mode in ("compile", "eager"))
    for i in range(3):
        compiled.lr = eager.lr = 0.02 / (1 + i)
        for size in (4, 3):
            expected, metrics = (e.step(*batch(i, size)) for e in (eager, compiled))
            assert error(metrics, expected) < 1e-9
    assert error(everything(compiled), everything(eager)) < 1e-9


@pytest.mark.parametrize("name", TERMS)
def test_terms_in_captured_iterations(name: str, taped: Callable[..., Engine]) -> None:  # noqa: F811
    eager, graph = fused(subject=learner(name)), taped(subject=learner(name))
    for i in range(WARM_UP + 2):
        eager.lr = graph.lr = 0.02 / (1 + i)
        same(graph.step(*batch(i)), eager.step(*batch(i)))
    assert graph._graphs is not None
    same(everything(graph), everything(eager))


@pytest.mark.parametrize("name", TERMS)
def test_terms_in_bfloat16(name: str) -> None:
    """The error against float64 is that of the few-line version under autocast: both round the same features."""

    def terms(dtype: torch.dtype, precision: Any, x: Tensor, y: Tensor) -> Tensor:
        metrics = engine(learner(name, dtype=dtype), precision=precision).step(x.to(dtype), y)
        return sum((v for k, v in metrics.items() if k.endswith("_loss")), torch.zeros(()))

    ours, autocast = [], []
    for seed in range(5):
        subject, (teachers, target) = learner(name, dtype=torch.float32), networks(dtype=torch.float32)
        x, y = batch(seed, 8, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            plain = PLAIN[name](teachers, target.train(), subject, x)
        wanted, rough = terms(torch.float64, "fp32", x, y), terms(torch.float32, "bf16", x, y)
        ours.append(abs(rough - wanted).item())
        autocast.append(abs(plain - wanted).item())
    assert statistics.median(ours) < 1.1 * statistics.median(autocast)


def test_terms_enter_the_total_loss_of_a_simulation() -> None:
    """Scheme "simulation" descends on L_total: the meta-gradient depends on a term's weight, "transfer"'s does not."""
    method = find_method("at")
    for scheme, depends in (("simulation", True), ("transfer", False)):
        grads = []
        for weight in (0.0, 50.0):
            teachers, target = networks()
            terms = find_method("at", [f"at.weight={weight}"]).make_terms()
            subject = L2T(
                teachers,
                target,
                source_layers=LAYERS["resnet8"],
                target_layers=TARGET_LAYERS,
                terms=terms,
                example=batch(0)[0],
            )
            grads.append(engine(subject, scheme=scheme).meta_gradient(*batch(0), val=batch(1)))
        assert (error(*grads) > 1e-3) == depends
    assert method.terms[0].name == "at"


def test_settings_change_what_is_published() -> None:
    settings = ["lwf.temperature=4", "at.weight=10", "lwf.weight=0.5"]
    subject, (teachers, target) = learner("lwf+at", settings=settings), networks()
    x, y = batch(0)
    metrics = engine(subject).step(x, y)
    parts = learner("lwf+at")
    assert abs(metrics["lwf_loss"] - plain_lwf(teachers, target, parts, x, 0.5, 4)) < 1e-9
    assert abs(metrics["at_loss"] - plain_at(teachers, target, parts, x, 10)) < 1e-9
    for bad in ("at.wight=1", "at.weight=-1", "at.weight", "fm.weight=1"):
        with pytest.raises(L2TError, match=r"no setting of a method: give a number for one of .*at.weight=1000"):
            find_method("at", [bad])
    with pytest.raises(L2TError, match="no method 'att': use one of scratch, finetune"):
        find_method("att")


def test_a_method_has_options_of_its_own() -> None:
    settings = ["l2t-ww.beta=0.1", "l2t-ww.meta_lr=1e-3", "fm-single.beta=2", "at.lr=0.05", "at.weight=10"]
    assert find_method("l2t-ww", settings).options == {"beta": 0.1, "meta_lr": 1e-3}
    assert find_method("fm-single", settings).options == {"beta": 2}
    at = find_method("at", settings)
    assert (at.options, at.settings) == ({"lr": 0.05}, (("at", "weight", 10),))
    assert find_method("lwf+at", settings).options == {}
    for bad in ("scratch.beta=1", "fm-single.meta_lr=1", "l2t-ww.weight=1", "l2t-ww.beta=-1"):
        with pytest.raises(L2TError, match=r"or for METHOD.lr, METHOD.beta, METHOD.meta_lr of a method that has it"):
            find_method("at", [bad])


def test_finetuning_copies_what_fits() -> None:
    start = METHODS["finetune"].start
    assert start is not None
    source, target, narrow = build_model("resnet8", 3), build_model("resnet14", 3), build_model("vgg9_bn", 3)
    with torch.no_grad():
        source.bn1.running_mean.fill_(0.25)
    before = copy.deepcopy(target.state_dict())
    told, copied = start(target, [source]), 0
    for name, tensor in target.state_dict().items():
        theirs = source.state_dict().get(name)
        fits = theirs is not None and theirs.shape == tensor.shape and "fc" not in name  # a fresh classifier
        assert torch.equal(tensor, theirs if fits else before[name])
        copied += fits
    assert told == f"{copied} of {len(before)} tensors from the source"
    assert 40 < copied < len(before)
    assert torch.equal(target.bn1.running_mean, torch.full((16,), 0.25))
    assert torch.equal(target.fc.weight, before["fc.weight"])
    with pytest.raises(L2TError, match=r"nothing of the source \(CifarResNet\) fits the target \(CifarVGG\)"):
        start(narrow, [source])
    with pytest.raises(L2TError, match="starts from one source, not 2"):
        start(target, [source, source])


def test_lwf_needs_a_linear_classifier() -> None:
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(L2TError, match=r"must end in an nn\.Linear"):
        L2T(
            build_model("resnet8", 5),
            target,
            source_layers=["layer1"],
            target_layers=["1"],
            pairs=[],
            terms=find_method("lwf").make_terms(),
            example=torch.zeros(2, 3, 32, 32),
        )


def test_every_method_is_tested() -> None:
    assert PLAIN.keys() | {"l2t-ww"} == METHODS.keys()
    assert all(method.cites for method in METHODS.values())
