"""A long training holds no more at its end than near its beginning."""

import sys

import pytest
import torch

from benchmarks.suites.held import held_rows


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_files_and_threads_stay() -> None:
    rows = list(held_rows(16, 60, torch.device("cpu")))
    early, late = rows[4:8], rows[-4:]
    assert late[0]["iterations"] > 2 * early[0]["iterations"]
    assert (late[-1]["files"], late[-1]["threads"]) == (early[0]["files"], early[0]["threads"])
    # The allocator's ups and downs are as large as a leak would be; the least of several epochs is free of them.
    least = [min(row["resident_bytes"] for row in part) for part in (early, late)]
    assert least[1] - least[0] < 16 * 2**20
