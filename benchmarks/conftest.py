"""`pytest benchmarks --benchmark-only`: pytest-benchmark's table of what `python -m benchmarks` measures.

Each test first asserts that the result is right, against float64, and then times it, by CUDA events on a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, Case
from benchmarks.contenders.judge import Judge
from benchmarks.measure import timing

CUDA = torch.cuda.is_available()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0) if CUDA else torch.device("cpu")


@pytest.fixture(scope="session", params=["tiny", "cifar", *(["imagenet", "four-source"] if CUDA else [])])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="session")
def judge(case: Case, device: torch.device) -> Judge:
    return Judge(case, device)


@pytest.fixture
def timed(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """Times a call: a few rounds after warm-up; `cold` overwrites the L2 cache of a GPU before each."""
    benchmark._timer = timing.clock(device)
    cache = None
    if device.type == "cuda":
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        cache = torch.empty(size, dtype=torch.int8, device=device)

    def run(call: Callable[[], Any], *, cold: bool = False, rounds: int = 10) -> None:
        setup = cache.zero_ if cold and cache is not None else None
        benchmark.pedantic(call, setup=setup and (lambda: setup() and None), rounds=rounds, warmup_rounds=2)

    return run
