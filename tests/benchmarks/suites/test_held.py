"""Long work holds no more at its end than near its beginning."""

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.suites.held import held, held_rows, worker_rows

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.slow]

WHAT = ("resident_bytes", "files", "threads", "processes")


def check_flat(early: Sequence[dict[str, Any]], late: Sequence[dict[str, Any]]) -> None:
    # A thread that is about to end may be seen still: the least of several epochs is free of it.
    least = {what: [min(row[what] for row in part) for part in (early, late)] for what in WHAT}
    for what in WHAT[1:]:
        assert least[what][1] == least[what][0]
    assert least["resident_bytes"][1] - least["resident_bytes"][0] < 4 * 2**20


@pytest.mark.parametrize("images", ["in memory", "in files"])
def test_memory_files_threads_and_processes_stay(images: str) -> None:
    before = held()["processes"]
    rows = list(held_rows(16, 60, torch.device("cpu"), images))
    assert rows[-1]["iterations"] > 2 * rows[4]["iterations"]
    check_flat(rows[4:8], rows[-4:])
    assert rows[-1]["processes"] == before


def test_a_worker_of_a_table_stays() -> None:
    rows = list(worker_rows(24, torch.device("cpu")))
    check_flat(rows[4:8], rows[-4:])
