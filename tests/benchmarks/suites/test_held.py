"""A long training holds no more at its end than near its beginning."""

import sys

import pytest
import torch

from benchmarks.suites.held import held_rows


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_files_and_threads_stay() -> None:
    rows = list(held_rows(12, 60, torch.device("cpu")))
    early, late = rows[3], rows[-1]
    assert late["iterations"] > 2 * early["iterations"]
    assert (late["files"], late["threads"]) == (early["files"], early["threads"])
    assert late["resident_bytes"] - early["resident_bytes"] < 16 * 2**20
