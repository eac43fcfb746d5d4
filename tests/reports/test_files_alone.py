"""Reports are made from files alone: where torch cannot be imported they are made all the same."""

import subprocess
import sys
from pathlib import Path

from l2t_fast.data.options import DataConfig
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import TrainConfig
from l2t_fast.settings.stored import save_config
from tests.reports.shared import PEAKED, training

WITHOUT_TORCH = """
import importlib, pkgutil, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "triton"):
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Blocked())

from rich.console import Console
from l2t_fast import reports

for module in pkgutil.walk_packages(reports.__path__, "l2t_fast.reports."):
    importlib.import_module(module.name)

from l2t_fast.reports.column import read_column
from l2t_fast.reports.inspection import inspect
from l2t_fast.reports.table import write_tables
from l2t_fast.settings.stored import load_config

folder = Path(sys.argv[1])
config = load_config(folder / "config.json")
column = read_column(folder, config, {})
for table in write_tables(folder, column.title, [column], config.method):
    Console().print(table)
inspect(folder, Console())
"""


def test_reports_need_no_torch(tmp_path: Path) -> None:
    config = resolve(TrainConfig(method=("scratch", "l2t-ww"), seeds=(0, 1), data=DataConfig("cifar100")))
    save_config(config, tmp_path / "config.json")
    for seed in (0, 1):
        training(tmp_path / f"scratch/seed-{seed}", [[1.0] * 4], meta=False)
        training(tmp_path / f"l2t-ww/seed-{seed}", [[1.0] * 4, [2.0, 1.0, 0.5, 1.0]], channels=[PEAKED] * 4)
    for path in tmp_path.glob("*/*/result.json"):
        path.write_text('{"test_accuracy_last": 0.5, "seconds": 1.0, "iterations": 1}')
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Best baseline: scratch" in done.stdout
    made = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert made >= {"table.md", "table.csv", "cells.csv", "table.png", "curves.png", "inspect.md"}
    assert "50.0 ± 0.0" in (tmp_path / "inspect.md").read_text()
