"""On how many batches contenders are judged."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.contenders import judge
from benchmarks.contenders.ways import REFERENCE
from tests.shared import SMALL_CASE

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 5), (4.0, 3), (8.0, 3), (100.0, 3)])
def test_more_batches_where_they_take_no_time(seconds: float, count: int) -> None:
    """An odd number of them, three at least; the clock stands still but for the float64 of a batch."""
    now = 0.0

    def meta_gradient(*_: Any) -> dict[str, torch.Tensor]:
        nonlocal now
        now += seconds
        return {"w": torch.ones(2, dtype=torch.float64)}

    one = SimpleNamespace(meta_gradient=meta_gradient)
    with (
        mock.patch.object(judge, "contender", return_value=one),
        mock.patch.object(judge, "perf_counter", side_effect=lambda: now),
        mock.patch.dict(judge.MOST, cpu=6),
        mock.patch.object(judge, "SPARE", 15.0),
    ):
        assert judge.Judge(SMALL_CASE, CPU).verdict(REFERENCE)["judged_on"] == count
        assert judge.Judge(SMALL_CASE, CPU, batches=1).verdict(REFERENCE)["judged_on"] == 1
