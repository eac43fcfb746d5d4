"""The paper's numbers stand beside runs with the paper's settings alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from l2t_fast.data.options import DataConfig
from l2t_fast.reports.published import Published, published
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import OptimConfig, SourceConfig, TargetConfig, TrainConfig

METHODS_OF_PAPER = ["scratch", "lwf", "at", "lwf+at", "fm-single", "fm-one-to-one", "l2t-w-single", "l2t-ww"]
OTHER_SETTINGS = {
    "epochs": 100,
    "batch_size": 64,
    "lr": 0.05,
    "momentum": 0.0,
    "weight_decay": 0.3,
    "beta": 0.0,
    "meta_lr": 1e-3,
    "inner_steps": 0,
    "scheme": "simulation",
    "where": "relu",
    "optimizer": "adamw",
    "label_smoothing": 0.1,
    "max_grad_norm": 1.0,
}


SLIDES = Path(__file__).parents[3] / "shared/published.json"
TWO = ("a.pt", "b.pt")


def given(
    dataset: str, weights: tuple[str, ...] | None = ("w.pt",), settings: tuple[str, ...] = (), **parts: Any
) -> Any:
    """What stands beside a run of `dataset` that differs from its defaults in `parts`."""
    return of_paper(dataset, weights, settings, **parts).numbers


def of_paper(
    dataset: str, weights: tuple[str, ...] | None = ("w.pt",), settings: tuple[str, ...] = (), **parts: Any
) -> Published:
    config = resolve(
        TrainConfig(
            method=tuple(METHODS_OF_PAPER),
            settings=settings,
            data=DataConfig(dataset, **parts.get("data", {})),
            source=SourceConfig(source_weights=weights, **parts.get("source", {})),
            target=TargetConfig(**parts.get("target", {})),
            optim=OptimConfig(**parts.get("optim", {})),
        )
    )
    return published(config)


def test_published_numbers_are_given_for_the_papers_settings_alone() -> None:
    assert given("cifar100")["l2t-ww"] == (70.96, 0.61)
    assert len(given("stl10")) == 9
    assert given("stanford40", ("imagenet",))["l2t-ww"] == (63.08, 0.88)
    assert given("stanford-dogs", ("imagenet",))["at"] == (69.70, 0.08)
    assert given("cifar100", optim={"mode": "graph", "precision": "tf32", "memory": "recompute"})
    for change in (
        {"weights": None},
        {"settings": ("at.weight=1",)},
        {"source": {"source_width": (0.5,)}},
        {"source": {"source": ("resnet20",)}},
        {"source": {"source": ("resnet32", "resnet32")}, "weights": ("a.pt", "b.pt")},
        {"source": {"source_layers": ("layer1",)}},
        {"target": {"target_width": 0.25}},
        {"target": {"target": "resnet32"}},
        {"target": {"target_layers": ("features.2",)}},
        {"data": {"classes": (0, 1)}},
        {"data": {"per_class": 50}},
        {"data": {"val_fraction": 0.2}},
        *({"optim": {name: value}} for name, value in OTHER_SETTINGS.items()),
    ):
        assert given("cifar100", **change) == {}, change
    assert given("cifar10") == {}
    assert given("stanford40", ("w.pt",)) == {}


def test_two_sources_of_stl10_have_the_numbers_of_table_2() -> None:
    for names in (("resnet32", "resnet20"), ("resnet20", "resnet32")):
        paper = of_paper("stl10", TWO, source={"source": names})
        assert (paper.numbers["l2t-ww"], len(paper.numbers)) == ((79.35, 0.41), 7)
        assert "Table 2" in paper.place
        assert "CIFAR-10" not in paper.place
    alike = of_paper("stl10", TWO, source={"source": ("resnet32", "resnet32")})
    assert alike.numbers["l2t-ww"] == (79.80, 0.52)
    assert "with the second one from CIFAR-10: " in alike.place  # no setting says what a checkpoint was trained on
    assert "l2t-ww 80.52 ± 0.29" in alike.place
    assert "Table 1" in of_paper("stl10").place
    for change in (
        {"source": ("resnet32", "resnet32", "resnet32")},
        {"source": ("resnet20", "resnet20")},
        {"source": ("resnet32", "resnet20"), "source_width": (1.0, 0.5)},
    ):
        weights = tuple(map(str, change["source"]))
        assert given("stl10", weights, source=change) == {}, change
    assert given("stl10", None, source={"source": ("resnet32", "resnet20")}) == {}
    assert given("stl10", TWO, source={"source": ("resnet32", "resnet20")}, optim={"epochs": 100}) == {}


@pytest.mark.skipif(not SLIDES.exists(), reason="the authors' slides are not here")
def test_every_number_is_that_of_the_slides() -> None:
    slides = json.loads(SLIDES.read_text())
    one, two = slides["single_source"], slides["multi_source"]
    for i, name in enumerate(one["columns"]):
        weights = ("imagenet",) if one["source_task"][i] == "imagenet" else ("w.pt",)
        found = given(name, weights, optim={"meta_lr": 1e-3 if name == "stanford40" else 1e-4})
        assert found == {method: tuple(row[i]) for method, row in one["rows"].items()}
    for i, second in ((1, "resnet20"), (2, "resnet32")):
        found = given("stl10", TWO, source={"source": ("resnet32", second)})
        assert found == {method: tuple(row[i]) for method, row in two["rows"].items()}
    place = of_paper("stl10", TWO, source={"source": ("resnet32", "resnet32")}).place
    assert place.count(" ± ") == len(two["rows"])
    assert all(f"{method} {row[3][0]:.2f} ± {row[3][1]:.2f}" in place for method, row in two["rows"].items())
