"""Trainings that take turns in one process."""

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.runs.launchers.base import at_work
from l2t_fast.runs.lock import check_free
from l2t_fast.runs.replicas import _Turns, side_by_side
from l2t_fast.runs.tasks import CellTask, cells_of, replicated
from l2t_fast.settings.options import TrainConfig
from l2t_fast.training.log import read_metrics
from tests.runs.commands import rows, table
from tests.shared import batch, engine, everything, learner, same

CPU = torch.device("cpu")


class Draws(nn.Dropout):
    """Of Python's and NumPy's generators, too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + random.random() + np.random.rand())  # noqa: NPY002


def train(seed: int, turns: list[int], hand_over: Any) -> dict[str, Tensor]:
    """Two iterations of a target that draws random numbers."""
    torch.manual_seed(seed)
    subject = engine(learner(dropout=Draws(0.5)), lr=0.02 * (seed + 1), inner_steps=1)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    for i in range(2):
        subject.step(*batch(10 * seed + i))
        turns.append(seed)
        hand_over()
    return everything(subject)


def test_each_computes_what_it_would_alone() -> None:
    """To the bit, random numbers included; what is drawn afterwards is as if nothing had been."""
    alone = [train(seed, [], lambda: None) for seed in range(2)]
    turns: list[int] = []
    torch.manual_seed(99)
    wanted = torch.rand(3)
    torch.manual_seed(99)
    found = side_by_side([partial(train, seed, turns) for seed in range(2)], CPU)
    assert torch.equal(torch.rand(3), wanted)
    assert turns == [0, 1, 0, 1]
    for one, other in zip(found, alone, strict=True):
        assert isinstance(one, dict)
        same(one, other)


def test_one_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    def call(name: str, steps: int, hand_over: Any) -> str:
        for i in range(steps):
            said.append(name)
            if name == "b" and i == 1:
                raise L2TError("no more")
            hand_over()
        return name

    ends = side_by_side([partial(call, name, steps) for name, steps in (("a", 1), ("b", 3), ("c", 3))], CPU)
    assert said == ["a", "b", "c", "b", "c", "c"]
    assert ends[::2] == ["a", "c"]
    assert str(ends[1]) == "no more"
    assert capsys.readouterr().err == ""


def test_cells_by_turns_are_those_one_by_one(tmp_path: Path, inline: None) -> None:
    given = ["--epochs", "2", "--seeds", "0", "--method", "scratch", "l2t-ww"]
    whole, turns = table(tmp_path, "whole", *given), table(tmp_path, "turns", *given, "--replicas", "2")
    assert rows(turns, "cells.csv") == rows(whole, "cells.csv")
    assert len(rows(whole, "cells.csv")) == 2
    for path in whole.glob("**/metrics.jsonl"):
        assert read_metrics(turns / path.relative_to(whole)) == read_metrics(path)


def test_replicas_are_of_one_column() -> None:
    cells: Any = [CellTask(Path(f"{c}{i}"), TrainConfig(name=c), "at", i, (), "cpu") for i in range(3) for c in "ab"]
    found = [[str(cell.folder) for cell in cells_of(task)] for task in replicated(cells, 2)]
    assert found == [["a0", "a1"], ["b0", "b1"], ["a2"], ["b2"]]
    assert replicated(cells, 1) == cells


def test_a_cell_that_diverges_is_said_of_it_alone(tmp_path: Path, inline: None) -> None:
    more = ["--beta", "1e39", "--epochs", "1", "--seeds", "0", "--method", "scratch", "fm-single", "--replicas", "2"]
    with pytest.raises(SystemExit):
        table(tmp_path, "hot", *more)
    assert [row["seeds"] for row in rows(tmp_path / "hot")] == ["1", "0"]
    assert "fm-single, seed 0: the matching loss of pairs" in (tmp_path / "hot/table.md").read_text()


def test_all_folders_of_replicas_are_held(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "config.json").touch()
    task: Any = SimpleNamespace(folder=folders[0], folders=folders, config_file=tmp_path / "config.json")
    with at_work(task, lambda: False):
        for folder in folders:
            with pytest.raises(L2TError, match=f"works in {folder}"):
                check_free(folder)
    for folder in folders:
        check_free(folder)


def test_a_gpu_is_begun_before_its_generators_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has none before, and a process that takes a table's cells begins with them."""
    generator = SimpleNamespace(graphsafe_get_state=lambda: "the state")
    monkeypatch.setattr(torch.cuda, "default_generators", ())
    monkeypatch.setattr(torch.cuda, "init", lambda: monkeypatch.setattr(torch.cuda, "default_generators", (generator,)))
    assert _Turns(1, torch.device("cuda"))._read()[0] == "the state"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_replicas_on_a_gpu(tmp_path: Path) -> None:
    """In a process of their own, where nothing has used the GPU before."""
    on_gpu = ("--device", "cuda", "--jobs", "1", "--replicas", "2", "--seeds", "0", "1", "--epochs", "5")
    folder = table(tmp_path, "t", *on_gpu, "--method", "scratch", "l2t-ww")
    assert len(list(folder.rglob("seed-*/result.json"))) == 4
