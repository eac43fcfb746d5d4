"""The paper's numbers stand beside runs with the paper's settings alone."""

from typing import Any

from l2t_fast.data.options import DataConfig
from l2t_fast.reports.published import published
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
}


def given(
    dataset: str, weights: tuple[str, ...] | None = ("w.pt",), settings: tuple[str, ...] = (), **parts: Any
) -> Any:
    """What stands beside a run of `dataset` that differs from its defaults in `parts`."""
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
