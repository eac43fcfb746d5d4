"""An iteration beside busy neighbours."""

import multiprocessing
import os

import pytest

from benchmarks.suites.busy import busy_rows


@pytest.mark.slow
def test_each_policy_takes_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "mine")
    rows = list(busy_rows("tiny", threads=1, iterations=1, rounds=1))
    assert [(row["policy"], row["neighbours"], len(row["ms"])) for row in rows] == [("active", 1, 1), ("passive", 1, 1)]
    assert all(row["ms_median"] > 0 for row in rows)
    assert os.environ["OMP_WAIT_POLICY"] == "mine"
    assert multiprocessing.active_children() == []
