"""Settings on disk, of this version and of older ones."""

import dataclasses
import json
from pathlib import Path

from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.options import OptimConfig, TableConfig, TrainConfig
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
    older["source"] |= {"source": "resnet8", "source_width": 1.0}  # of a version with one source
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert load_config(tmp_path / "config.json") == dataclasses.replace(column, settings=())


def test_what_may_change_when_a_run_goes_on() -> None:
    saved = TrainConfig(name="a", seeds=(1,), optim=OptimConfig(lr=0.3, mode="graph", memory="recompute"))
    given = TrainConfig(name="b", device="cpu", resume=True, optim=OptimConfig(lr=0.1, mode="eager"))
    optim = dataclasses.replace(saved.optim, mode="eager")
    assert updated(saved, given, TrainConfig()) == dataclasses.replace(saved, device="cpu", optim=optim)
