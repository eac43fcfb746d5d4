"""The command that repeats a run gives its settings again."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

from l2t_fast.data.options import DataConfig, DataOptions
from l2t_fast.reports.repeat import repeating_command
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import (
    OptimConfig,
    PretrainConfig,
    SourceConfig,
    TableConfig,
    TargetConfig,
    TrainConfig,
)


def parsed(kind: Any, command: str) -> Any:
    _, _, *arguments = shlex.split(command)
    return tyro.cli(tyro.conf.OmitArgPrefixes[kind], args=arguments)


@pytest.mark.parametrize(
    "asked",
    [
        TrainConfig(),
        TrainConfig(seeds=(4,), optim=OptimConfig(nesterov=True, where="softplus"), settings=("l2t-ww.beta=0.1",)),
        TrainConfig(optim=OptimConfig(optimizer="adamw", weight_decay=0.1, label_smoothing=0.1, max_grad_norm=2.0)),
        TrainConfig(data=DataConfig("digits", classes=(1, 2)), source=SourceConfig(source_classes=(3, 4))),
        TrainConfig(
            method=("at", "l2t-ww"),
            device="cpu",
            data=DataConfig("folder", data_root=Path("my pictures"), image_size=64),
            source=SourceConfig(("resnet34", "resnet18"), ("imagenet", "it's.pt"), source_layers=("layer1", "layer2")),
            target=TargetConfig("vgg9_bn", 0.5, ("features.2",)),
            optim=OptimConfig(lr=0.05, meta_lr=1e-5, batch_size=16),
        ),
    ],
)
def test_a_run(asked: TrainConfig) -> None:
    config = dataclasses.replace(resolve(asked), name="run")
    command = repeating_command(config)
    again = resolve(parsed(TrainConfig, command))
    assert dataclasses.replace(again, name="run") == config
    assert again.name == "run-again"


def test_it_says_no_more_than_is_needed() -> None:
    config = dataclasses.replace(resolve(TrainConfig(optim=OptimConfig(lr=0.5))), name="run")
    assert repeating_command(config) == "l2t-fast train --name run-again --lr 0.5"


def test_a_table() -> None:
    table = TableConfig("t", method=("l2t-ww",), per_class=("50,100",), threads=2, data=DataOptions(val_fraction=0.2))
    assert parsed(TableConfig, repeating_command(table)) == dataclasses.replace(table, name="t-again")


def test_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from l2t_fast.runs import pretrain

    made: list[TrainConfig] = []

    def stop(folder: Path, config: TrainConfig, *more: Any) -> None:
        made.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "train", stop)
    asked = PretrainConfig(runs=tmp_path, network="resnet8", width=0.5, data=DataConfig(classes=(0, 1)))
    for config in (asked, None):
        again = config or dataclasses.replace(parsed(PretrainConfig, repeating_command(made[0])), runs=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(again, None)  # type: ignore[arg-type]
    assert dataclasses.replace(made[1], name=made[0].name) == made[0]
