"""Contenders are judged before they are timed."""

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.cases import Case, State
from benchmarks.contenders import official, ways
from benchmarks.contenders.judge import Judge
from benchmarks.report.columns import SECTIONS, table
from benchmarks.suites import iterations
from l2t_fast import Engine
from tests.shared import SMALL_CASE

CPU = torch.device("cpu")
RATES = {"copy": 1e10, "fp32": 1e11, "tf32": 1e12}
OFFICIALS = [ways.Way("official"), ways.Way("official", precision="tf32")]


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


def test_speedups_over_the_official_code_with_and_without_tf32(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its step runs under its own switches, and leaves them as all others want them."""
    switches = []

    class Official:
        def __init__(self, checkout: Path, case: Case, state: State, device: torch.device, dtype: torch.dtype) -> None:
            self._reference = case.reference(device, dtype, state)

        def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
            switches.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            self._reference.step(x, y)

        meta_gradient = None  # not asked for

        def close(self) -> None:
            pass

    monkeypatch.setattr(official, "Official", Official)
    monkeypatch.setattr(Judge, "verdict", lambda *_: {"correct": True})
    chosen = ways.ways_of(torch.device("cuda"), tmp_path, ["eager"], ["fp32", "tf32"])
    assert chosen[:4] == [ways.REFERENCE, *OFFICIALS, ways.Way(precision="fp32")]
    assert ways.ways_of(torch.device("cuda"), tmp_path, ["graph"], ["bf16"]) == [
        ways.REFERENCE,
        ways.Way(mode="graph", precision="bf16"),
    ]
    rows = list(iterations.iteration_rows(SMALL_CASE, [*OFFICIALS, ways.Way()], RATES, 1, CPU, judge, tmp_path))
    assert set(switches) == {("highest", False), ("highest", True)}
    assert not torch.backends.cudnn.allow_tf32
    speedups = [{name for name in row if name.startswith("speedup_over")} for row in rows]
    assert speedups == [{"speedup_over_official_tf32"}, {"speedup_over_official"}, {*speedups[0], *speedups[1]}]
    columns = table(SECTIONS["iteration"].columns, rows)
    assert "× official tf32" in columns


def test_other_libraries_agree_or_say_that_they_are_missing(judge: Judge) -> None:
    rows = {row["by"]: row for row in iterations.meta_gradient_rows(SMALL_CASE, RATES, 1, CPU, judge)}
    assert sorted(rows) == ["engine", "higher", "reference", "torchopt"]
    for name in ("higher", "torchopt"):
        assert rows[name].get("correct") or rows[name]["unavailable"].startswith("ModuleNotFoundError")
