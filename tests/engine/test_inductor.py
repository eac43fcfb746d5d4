"""Code that Inductor generates; slow, and so on the newest versions alone."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from l2t_fast import Engine
from tests.engine.shared import small_batch, small_learner
from tests.shared import engine, error, everything

pytestmark = pytest.mark.slow


def test_it_is_as_exact_and_a_second_start_takes_it_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def small(mode: str) -> Engine:
        return engine(small_learner(pairs="single"), mode=mode, inner_steps=2)

    compiled, eager = small("compile"), small("eager")
    counters.clear()
    try:
        expected, metrics = (e.step(*small_batch(0, 8)) for e in (eager, compiled))
        assert error(metrics, expected) < 1e-9
        assert error(everything(compiled), everything(eager)) < 1e-9
        made = counters["inductor"]["fxgraph_cache_miss"]
        assert made > 6  # forward and backward
        torch.compiler.reset()  # as in a new process
        counters.clear()
        small("compile").step(*small_batch(0, 8))
        assert counters["inductor"]["fxgraph_cache_hit"] == made
        assert counters["inductor"]["fxgraph_cache_miss"] == 0
    finally:
        torch.compiler.reset()
