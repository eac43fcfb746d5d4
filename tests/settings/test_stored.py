"""Settings on disk, of this version and of older ones."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from l2t_fast.errors import L2TError
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import OptimConfig, SourceConfig, TableConfig, TrainConfig
from l2t_fast.settings.stored import load_config, load_table, save_config, updated


def test_settings_are_kept_with_the_table(tmp_path: Path) -> None:
    config = TableConfig(method=("at", "scratch"), settings=("at.weight=5",), threads=3)
    save_config(config, tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == config
    (column,) = column_configs(config).values()
    save_config(column, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == column
    assert column.settings == ("at.weight=5",)
    older = json.loads((tmp_path / "config.json").read_text())
    del older["settings"], older["optim"]["where"]
    del older["optim"]["optimizer"], older["optim"]["label_smoothing"], older["optim"]["max_grad_norm"]
    older["source"] |= {"source": "resnet8", "source_width": 1.0}  # of a version with one source
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert load_config(tmp_path / "config.json") == dataclasses.replace(column, settings=())


def test_what_may_change_when_a_run_goes_on() -> None:
    saved = TrainConfig(name="a", seeds=(1,), optim=OptimConfig(lr=0.3, mode="graph", memory="recompute"))
    given = TrainConfig(name="b", device="cpu", resume=True, optim=OptimConfig(lr=0.1, mode="eager"))
    optim = dataclasses.replace(saved.optim, mode="eager")
    assert updated(saved, given, TrainConfig()) == dataclasses.replace(saved, device="cpu", optim=optim)


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("optim", "epochs", -5, "--epochs -5 is too small: give at least 1"),
        ("optim", "epochs", 1.5, "'epochs' cannot be 1.5"),
        ("optim", "epochs", True, "'epochs' cannot be true"),
        ("optim", "lr", "fast", "'lr' cannot be \"fast\""),
        ("optim", "scheme", "other", "'scheme' cannot be"),
        ("optim", "rate", 1, "there is no setting 'rate'"),
        ("source", "source_width", ["1"], "'source_width' cannot be"),
        ("data", "dataset", None, "'dataset' cannot be null"),
        ("", "seeds", [-1], "--seeds -1 is too small"),
        ("", "seeds", [], "--seeds : give at least one"),
        ("", "method", ["l2t"], "there is no method 'l2t'"),
        ("", "name", "../x", "--name '../x' is not the name of a folder"),
        ("", "optim", 5, "'optim' cannot be 5"),
        ("target", "target", None, "--target None is no network: give its name"),
        ("target", "target_width", None, "--target-width None is too small"),
    ],
)
def test_an_edited_value_is_named(tmp_path: Path, part: str, key: str, value: Any, words: str) -> None:
    path = tmp_path / "config.json"
    save_config(resolve(TrainConfig(name="run")), path)
    load_config(path)
    content = json.loads(path.read_text())
    (content[part] if part else content)[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(L2TError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: {words}")


def test_settings_with_weights_are_read_again(tmp_path: Path) -> None:
    """What was filled in beside them is no contradiction."""
    config = resolve(TrainConfig(source=SourceConfig(source_weights=("x.pt",))))
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_a_setting_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(resolve(TrainConfig(name="run")), path)
    path.write_text(path.read_text().replace('"beta": 0.5', '"beta": 0.5, "beta": 0.7'))
    with pytest.raises(L2TError, match=r"config.json: 'beta' is there twice: remove one of them"):
        load_config(path)
