"""Trainings side by side."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.suites import jobs
from l2t_fast.runs import table
from l2t_fast.settings.options import TableConfig
from tests.shared import SMALL_CASE


def test_side_by_side_begins_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of jobs trains the same cells, in turn."""
    seen: list[tuple[int, int, int]] = []

    def run(config: TableConfig, console: object) -> None:
        folder = config.runs / str(config.name)
        done = len(list(folder.glob("digits-*/*/seed-*")))
        seen.append((config.jobs or 0, config.threads or 0, done))
        for method in config.method:
            (folder / "digits-vgg9_bn-10" / method / "seed-0").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(table, "run", run)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    given = SimpleNamespace(methods=["scratch", "l2t-ww"], seeds=1, epochs=1, rounds=2, jobs=[1, 2])
    found = list(jobs.job_rows(given, torch.device("cpu")))
    assert seen == [(1, 4, 0), (2, 2, 0), (1, 4, 0), (2, 2, 0), (1, 4, 0), (2, 2, 0)]  # sources, then two rounds
    assert [(row["jobs"], row["round"]) for row in found] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert all(row["trainings_per_minute"] == pytest.approx(60 * 2 / row["seconds"]) for row in found)


def test_replicas_end_where_each_ends_alone() -> None:
    case = replace(SMALL_CASE, target_width=0.0625)
    found = list(jobs.replica_rows(case, [1, 2], rounds=1, steps=1, device=torch.device("cpu")))
    assert [(row["replicas"], row["iterations"], row["error"], row["correct"]) for row in found] == [
        (1, 1, 0.0, True),
        (2, 2, 0.0, True),
    ]
    assert all(row["iterations_per_second"] == pytest.approx(row["iterations"] / row["seconds"]) for row in found)
