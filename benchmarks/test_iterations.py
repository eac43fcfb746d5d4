"""Whole iterations and their parts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.suites import iterations
from benchmarks.suites import steps as parts
from benchmarks.suites.iterations import Judge, Way

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STEPS = ["matching step", "matching step, adjoint", "task step", "task step, adjoint"]


@pytest.mark.parametrize("way", iterations.ways_of(DEVICE, None, iterations.MODES), ids=str)
def test_iteration(way: Way, case: Case, judge: Judge, device: torch.device, timed: Callable[..., Any]) -> None:
    one = iterations.contender(way, case, judge.state, device, False, None)
    verdict = judge.verdict(way, one, iterations.double(way, judge))
    assert verdict["correct"], verdict
    timed(partial(one.step, *case.images(0, device, torch.float32)), rounds=5)


@pytest.mark.parametrize("by", ["plain", "engine", *(["compiled"] if CUDA else [])])
@pytest.mark.parametrize("name", [*STEPS, "source pre-pass", "input pipeline"])
def test_part(name: str, by: str, case: Case, judge: Judge, device: torch.device, timed: Callable[..., Any]) -> None:
    part = next((part for part in parts.parts(case, device, judge.state) if part.name == name), None)
    if part is None or by not in part.timed:
        pytest.skip(f"there is no {by} {name} of {case.name}")
    assert parts.relative_error(part.checked[by]()(), part.exact()()) <= parts.TOLERANCE
    timed(part.timed[by]())
