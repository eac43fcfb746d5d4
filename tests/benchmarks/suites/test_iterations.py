"""Contenders are judged before they are timed."""

from functools import partial

import pytest
import torch

from benchmarks.contenders import ways
from benchmarks.contenders.judge import Judge
from benchmarks.report.columns import SECTIONS, table
from benchmarks.suites import iterations
from l2t_fast import Engine
from tests.shared import SMALL_CASE

CPU = torch.device("cpu")
RATES = {"copy": 1e10, "fp32": 1e11}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(SMALL_CASE, CPU, batches=1)


def test_an_incorrect_contender_gets_no_speedup(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [ways.REFERENCE, ways.Way()]
    rows = list(iterations.iteration_rows(SMALL_CASE, chosen, RATES, 2, CPU, judge))
    assert [row["correct"] for row in rows] == [True, True]
    assert rows[1]["speedup_over_reference"] > 0
    assert all(row["flops"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert rows[1]["error_float64"] < 1e-9

    monkeypatch.setattr(ways, "Engine", partial(Engine, beta=0.4995))
    rows = list(iterations.iteration_rows(SMALL_CASE, chosen, RATES, 2, CPU, judge))
    assert [row["correct"] for row in rows] == [True, False]
    assert not any(name.startswith("speedup") for name in rows[1])
    assert "inexact" in table(SECTIONS["iteration"].columns, rows)


def test_what_cannot_be_had_is_a_row(judge: Judge) -> None:
    chosen = [ways.Way(mode="graph"), ways.Way("official")]
    rows = list(iterations.iteration_rows(SMALL_CASE, chosen, RATES, 1, CPU, judge))
    assert ["L2TError" in row["unavailable"] for row in rows] == [True, True]


def test_other_libraries_agree_or_say_that_they_are_missing(judge: Judge) -> None:
    rows = {row["by"]: row for row in iterations.meta_gradient_rows(SMALL_CASE, RATES, 1, CPU, judge)}
    assert sorted(rows) == ["engine", "higher", "reference", "torchopt"]
    for name in ("higher", "torchopt"):
        assert rows[name].get("correct") or rows[name]["unavailable"].startswith("ModuleNotFoundError")
