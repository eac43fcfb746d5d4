"""Losses of the user's: against the oracle in float64, in every mode, and refused where they would be wrong."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast import Engine, L2TError
from l2t_fast.engine.capture import WARM_UP
from tests.engine.shared import (
    CLASSES,
    X,
    Y,
    assert_close,
    assert_identical,
    beside_the_reference,
    block,
    flat,
    small_batch,
    small_learner,
    small_net,
    snapshot,
)
from tests.engine.test_capture import taped  # noqa: F401
from tests.shared import engine as make_engine
from tests.shared import everything, same

pytestmark = pytest.mark.core

WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def focal(outputs: Tensor, y: Tensor, gamma: float = 2.0) -> Tensor:
    p = F.log_softmax(outputs, 1).gather(1, y[:, None]).exp()
    return (-((1 - p) ** gamma) * p.log()).mean()


def regression() -> nn.Module:
    """Outputs [B]."""
    *features, _ = small_net(nn.Softplus()).children()
    return nn.Sequential(*features, nn.Linear(4, 1), nn.Flatten(0)).double()


def segmentation() -> nn.Module:
    """Outputs [B, classes, H, W]."""
    head = nn.Sequential(nn.Conv2d(4, CLASSES, 1), nn.Upsample(scale_factor=4, mode="bilinear"))
    return nn.Sequential(block(3, 5, 2, nn.Softplus()), nn.Identity(), block(5, 4, 2, nn.Softplus()), *head).double()


def classification() -> nn.Module:
    return small_net(nn.Softplus())


def soft(y: Tensor) -> Tensor:
    """Mixup of each image with the next."""
    one_hot = F.one_hot(y, CLASSES).double()
    return 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)


def masks(y: Tensor) -> Tensor:
    maps = (y[:, None, None] + torch.arange(64).view(8, 8)) % CLASSES
    return maps.masked_fill(torch.arange(64).view(8, 8) % 5 == 0, 255)


def hard(y: Tensor) -> Tensor:
    return y


CASES: dict[str, tuple[Any, Any, Any]] = {  # the loss, the target, the labels
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), classification, hard),
    "label smoothing": (partial(F.cross_entropy, label_smoothing=0.1), classification, hard),
    "soft labels": (F.cross_entropy, classification, soft),
    "mixup with label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), classification, soft),
    "focal": (focal, classification, hard),
    "multi-label": (
        partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
        classification,
        lambda y: F.one_hot(y, CLASSES).double().cummax(1).values,
    ),
    "regression": (nn.HuberLoss(delta=0.3), regression, lambda y: y.double() - 1),
    "segmentation": (nn.CrossEntropyLoss(ignore_index=255), segmentation, masks),
}


@pytest.mark.parametrize(("name", "scheme"), list(zip(CASES, ["transfer", "simulation"] * 4, strict=True)))
def test_losses_equal_those_of_the_reference(name: str, scheme: str) -> None:
    loss, target, labels = CASES[name]
    torch.manual_seed(0)
    options: dict[str, Any] = {"loss": loss, "scheme": scheme, "two_sources": False, "size": 8, "warm": 0}
    engine, reference = beside_the_reference(target(), ["0", "2"], **options, memory="recompute")
    val = (X.flip(0), labels(Y.flip(0)))
    for seed in range(2):
        x, y = small_batch(seed, 8)
        gradient = engine.meta_gradient(x, labels(y), val)
        assert_close(gradient, reference.meta_gradient(x, labels(y), val))
        assert flat(gradient).norm() > 0
        expected, metrics = reference.step(x, labels(y), val), engine.step(x, labels(y), val)
        assert_close({k: metrics[k] for k in expected}, expected)
    assert_close(engine.state_dict()["theta"], {k: p.detach() for k, p in reference.theta.items()})


@pytest.mark.parametrize("name", CASES)
def test_accuracy_exists_where_it_means_something(name: str) -> None:
    loss, target, labels = CASES[name]
    torch.manual_seed(0)
    learner = small_learner(target())
    outputs = learner.target_outputs(X)[0].detach()
    metrics = Engine(learner, loss=loss).step(X, labels(Y))
    assert ("accuracy" in metrics) == (name not in ("focal", "multi-label", "regression"))
    if "accuracy" in metrics:
        guess, y = outputs.argmax(1).flatten(), labels(Y)
        if y.is_floating_point():
            expected = y[range(len(y)), guess].mean()
        else:
            counted = y.flatten() != 255
            expected = (guess == y.flatten())[counted].double().mean()
        assert torch.isclose(metrics["accuracy"], expected)


class Scaled:
    """Cross entropy times a number that may be set."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(outputs, y)


def test_what_a_loss_is_made_of_is_not_frozen_in_captured_iterations(taped: Callable[..., Engine]) -> None:  # noqa: F811
    """A number is read again, and a tensor that is written to is read by the replay."""
    weight, alpha = WEIGHT.clone(), 1.0

    def weighted(outputs: Tensor, y: Tensor) -> Tensor:
        return alpha * F.cross_entropy(outputs, y, weight)

    scaled = Scaled()
    for loss in (weighted, partial(scaled)):
        eager, graph = (
            make(subject=small_learner(pairs="single"), inner_steps=1, loss=loss) for make in (make_engine, taped)
        )
        eager.trained.adam.param_groups[0]["fused"] = True  # type: ignore[union-attr]
        for i in range(WARM_UP + 2):
            same(graph.step(*small_batch(i, 8)), eager.step(*small_batch(i, 8)))
        alpha, scaled.scale = 3.0 + alpha, 2.0 + scaled.scale
        weight[0] += 5
        for i in range(WARM_UP + 2):
            same(graph.step(*small_batch(i, 8)), eager.step(*small_batch(i, 8)))
        same(everything(graph), everything(eager))


def test_labels_of_another_dtype_get_a_graph_of_their_own(taped: Callable[..., Engine]) -> None:  # noqa: F811
    def between(outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], y.to(outputs.dtype))

    eager, graph = (make(subject=small_learner(pairs=[]), loss=between) for make in (make_engine, taped))
    for _ in range(WARM_UP + 2):
        for y in (Y, Y + 0.5):
            same(graph.step(X, y), eager.step(X, y))


def test_a_loss_with_its_own_dropout_draws_alike_in_both_memories() -> None:
    def dropped(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.dropout(outputs, 0.5), y)

    engines = [Engine(small_learner(), loss=dropped, memory=memory) for memory in ("save", "recompute")]  # type: ignore[arg-type]
    for i in range(2):
        gradients = []
        for engine in engines:
            torch.manual_seed(i)
            gradients.append(engine.meta_gradient(*small_batch(i, 8)))
            engine.step(*small_batch(i, 8))
        assert_close(*gradients, 1e-12)
    assert flat(gradients[0]).norm() > 0


class Average(nn.Module):
    """Centred by a running mean, a buffer that each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(CLASSES, dtype=torch.float64))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(outputs.detach().mean(0))
        return F.cross_entropy(outputs - self.mean, y)


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(outputs, y)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs / self.temperature, y)


REFUSED: list[tuple[Any, str]] = [
    (nn.CrossEntropyLoss(reduction="none"), r"gives torch.float64 \[4\], not a scalar: reduce it"),
    (lambda outputs, y: 0.5, r"gives float, not a scalar"),
    (lambda outputs, y: F.cross_entropy(outputs.detach(), y), r"does not depend on the target's outputs"),
    (nn.MultiMarginLoss(), r"the loss cannot be differentiated twice \(.*multi_margin"),
    (lambda outputs, y: (outputs - outputs.max()).log().sum(), r"is not finite on the first batch"),
    (lambda outputs, y: (outputs - outputs.detach()).abs().pow(1.5).sum(), r"second derivative .* is not finite"),
    (nn.CrossEntropyLoss(weight=WEIGHT.float()), r"cannot be computed on outputs torch.float64 \[4, 3\] and labels"),
    (nn.MSELoss(), r"cannot be computed on outputs .* and labels torch.int64 \[4\]"),
    (
        lambda outputs, y: F.mse_loss(outputs[:, :1], y.double()),
        r"cannot be computed .*Using a target size .* that is different to the input size",
    ),
    (Average(), r"changes what it holds"),
    (Counting(), r"changes what it holds"),
    (Learned(), r"depends on parameters of its own"),
]


@pytest.mark.parametrize(("loss", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_would_be_wrong_is_refused_and_nothing_changed(loss: Any, message: str) -> None:
    engine = Engine(small_learner(), loss=loss)
    before, held = snapshot(engine), dict(vars(loss)) if hasattr(loss, "calls") else None
    buffers = {name: b.clone() for name, b in loss.named_buffers()} if isinstance(loss, nn.Module) else {}
    for function in (engine.step, engine.meta_gradient):
        with pytest.raises(L2TError, match=message):
            function(X, Y)
        assert_identical(snapshot(engine), before)
    assert held is None or held.keys() == vars(loss).keys()
    if isinstance(loss, nn.Module):
        assert_identical(dict(loss.named_buffers()), buffers)


def test_a_penalty_on_parameters_past_the_outputs_is_refused() -> None:
    learner = small_learner()

    def with_decay(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + sum(p.square().sum() for p in learner.target.parameters())

    with pytest.raises(L2TError, match="or of the target past its outputs"):
        Engine(learner, loss=with_decay).step(X, Y)


def test_a_loss_without_second_derivative_serves_where_nothing_is_learned() -> None:
    engine = Engine(small_learner(what="uniform", where="fixed"), loss=nn.MultiMarginLoss())
    assert engine.step(X, Y)["loss"].isfinite()


@pytest.mark.parametrize(("loss", "message"), [
    ("ce", r"loss='ce' is not to be had: give a function"),
    (nn.CrossEntropyLoss, r"is not to be had: give a function"),
])  # fmt: skip
def test_what_is_no_loss(loss: Any, message: str) -> None:
    with pytest.raises(L2TError, match=message):
        Engine(small_learner(), loss=loss)


def test_outputs_without_classes_need_a_loss() -> None:
    with pytest.raises(L2TError, match=r"the target returns \[B\], which has no classes: give the loss="):
        Engine(small_learner(regression()))


@pytest.mark.parametrize(("loss", "target", "y", "message"), [
    (F.cross_entropy, classification, soft(Y).float(), r"or probabilities .*, torch.float64\), not torch.float32"),
    (F.cross_entropy, classification, soft(Y)[:, :2], r"not torch.float64 \[4, 2\]"),
    (nn.CrossEntropyLoss(), segmentation, Y, r"must be int64 of shape \[4, ...\]"),
    (nn.CrossEntropyLoss(), segmentation, masks(Y), r"labels go from 0 to 255"),
    (nn.CrossEntropyLoss(ignore_index=7), classification, 0 * Y + 7, r"all labels are 7, which the loss ignores"),
    (nn.MSELoss(), regression, Y[:2].double(), r"labels must be of shape \[4, ...\]"),
])  # fmt: skip
def test_labels_that_do_not_fit(loss: Any, target: Any, y: Tensor, message: str) -> None:
    with pytest.raises(L2TError, match=message):
        Engine(small_learner(target()), loss=loss).step(X, y)
