"""Long work holds no more at its end than near its beginning."""

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.suites.held import held, held_rows, worker_rows

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.slow]


def check_flat(early: Sequence[dict[str, Any]], late: Sequence[dict[str, Any]]) -> None:
    for what in ("files", "threads", "processes"):
        assert late[-1][what] == early[0][what]
    # The allocator's ups and downs are as large as a leak would be; the least of several epochs is free of them.
    least = [min(row["resident_bytes"] for row in part) for part in (early, late)]
    assert least[1] - least[0] < 16 * 2**20


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
