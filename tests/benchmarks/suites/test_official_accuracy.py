"""Two trainings beside each other; the reference stands in for the authors' code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.contenders.official import _Recorded
from benchmarks.suites import official_accuracy as suite
from l2t_fast.data.images import TensorSet
from l2t_fast.data.splits import Data
from l2t_fast.networks.layers import default_layers
from l2t_fast.reference import Reference
from l2t_fast.training.fit import Schedule
from tests.shared import CLASSES, batch, engine, learner

SCHEDULE = Schedule(epochs=2, batch_size=4, lr=0.02, seed=0)


def images(count: int, seed: int, augment: bool = False) -> TensorSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator).byte()
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorSet(labels=labels, augment=augment, images=pixels, flip=True)


DATA = Data(images(10, 0, augment=True), images(0, 1), images(9, 2), CLASSES, (3, 32, 32))


class Twin:
    """The reference, with a second pass of the batch as the authors' code has it."""

    def __init__(self, second_pass: bool) -> None:
        ours, self._second_pass = learner(), second_pass
        self._reference = Reference(
            list(ours.sources),
            ours.target,
            source_layers=[default_layers("resnet8", ours.sources[0])],
            target_layers=default_layers("vgg9_bn", ours.target),
            pairs=[(pair.source, pair.m, pair.n) for pair in ours.pairs],
            example=batch(0)[0],
            lr=0.02,
            meta_lr=1e-3,
        )
        self.network = ours.target
        for part in ("projections", "what", "where"):
            getattr(self._reference, part).load_state_dict(getattr(ours, part).state_dict())

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        metrics = self._reference.step(x, y)
        if self._second_pass:
            with torch.no_grad():
                self.network(x)
        return metrics

    def set_lr(self, lr: float) -> None:
        for group in self._reference.optimizer.param_groups:
            group["lr"] = lr


def ours(variant: str, most: int | None = None) -> suite.Curves:
    return suite.train(
        suite.EngineSide(engine(), variant != "statistics"), variant, DATA, SCHEDULE, torch.float64, most
    )


@pytest.mark.parametrize("variant", ["plain", "statistics"])
def test_alike_sides_have_alike_curves(variant: str) -> None:
    theirs = suite.train(Twin(variant == "plain"), variant, DATA, SCHEDULE, torch.float64, 3)
    row = suite.apart(ours(variant, 3), theirs)
    assert [row[name]["alike_for"] for name in suite.LOSSES] == [3, 3, 3]
    assert max(row["loss"]["differences"]) < 1e-9
    assert row["statistics"] < 1e-9


def test_a_difference_is_seen_where_it_is() -> None:
    """The second pass changes running statistics alone; another loss counts from its iteration on."""
    plain, other = ours("plain", 3), ours("statistics", 3)
    row = suite.apart(plain, other)
    assert [row[name]["alike_for"] for name in suite.LOSSES] == [3, 3, 3]
    assert row["statistics"] > 1e-3
    losses = {**plain.losses, "loss": [*plain.losses["loss"][:2], float("nan")]}
    assert suite.apart(plain._replace(losses=losses), plain)["loss"]["alike_for"] == 2


def test_variants_differ_in_one_thing() -> None:
    seen: dict[str, list[tuple[float, int]]] = {}

    class Still:
        network = learner().target
        lr = 0.0

        def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            seen[variant].append((self.lr, len(y)))
            pixels[variant] = x
            return dict.fromkeys(suite.LOSSES, x.sum())

        def set_lr(self, lr: float) -> None:
            self.lr = lr

    pixels: dict[str, Tensor] = {}
    for variant in suite.VARIANTS:
        seen[variant] = []
        suite.train(Still(), variant, DATA, SCHEDULE, torch.float64, None)
    plain = seen["plain"]
    assert [size for _, size in plain] == [4, 4, 2] * 2
    assert [lr for lr, _ in plain] == pytest.approx([0.02] * 3 + [0.01] * 3)
    assert seen["statistics"] == seen["augmentation"] == plain
    assert [lr for lr, _ in seen["schedule"]] == pytest.approx([0.01] * 3 + [0] * 3)
    assert [size for _, size in seen["last-batch"]] == [4] * 4
    assert torch.equal(pixels["plain"], pixels["schedule"])
    assert not torch.equal(pixels["plain"], pixels["augmentation"])


def test_accuracy_takes_networks_that_return_their_features() -> None:
    network = learner().target

    class WithFeatures(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return network.eval()(x), x

    assert suite.accuracy(WithFeatures(), DATA.test, torch.float64) == suite.accuracy(network, DATA.test, torch.float64)
    assert suite.accuracy(network, DATA.test, torch.float64) in [i / 9 for i in range(10)]


def test_cross_entropies_are_noted() -> None:
    found: list[tuple[str, Tensor]] = []
    F: Any = _Recorded(torch.nn.functional, found)
    x = torch.randn(2, 3, requires_grad=True)
    value = F.cross_entropy(x, torch.tensor([0, 1]))
    assert value.requires_grad
    assert F.relu6 is torch.nn.functional.relu6
    assert found[0][0] == "loss"
    assert torch.equal(found[0][1], value)
    assert not found[0][1].requires_grad


def test_the_summary_has_mean_and_spread() -> None:
    rows = [{"kind": "parity", "variant": "plain", "by": "engine", "test_accuracy": a} for a in (0.4, 0.5)]
    assert suite.summary([*rows, {"kind": "curves", "variant": "plain"}]) == [
        "plain, engine: 45.00 ± 7.07 % of the test images"
    ]
