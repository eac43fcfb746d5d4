"""Whole iterations and their steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.contenders.judge import Judge, relative_error
from benchmarks.contenders.ways import MODES, Way, contender, ways_of
from benchmarks.suites.steps import TOLERANCE, steps

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STEPS = ["matching step", "matching step, adjoint", "task step", "task step, adjoint"]


@pytest.mark.parametrize("way", ways_of(DEVICE, None, MODES), ids=str)
def test_iteration(way: Way, case: Case, judge: Judge, device: torch.device, timed: Callable[..., Any]) -> None:
    one = contender(way, case, judge.state, device, False, None)
    verdict = judge.verdict(way)
    assert verdict["correct"], verdict
    if way.by == "engine" and way.mode != "eager":
        replay = judge.replay(way, one, case)
        assert replay["correct"], replay
    timed(partial(one.step, *case.images(0, device, torch.float32)), rounds=5)


@pytest.mark.parametrize("by", ["plain", "engine", *(["compiled"] if CUDA else [])])
@pytest.mark.parametrize("name", [*STEPS, "source pre-pass", "input pipeline"])
def test_step(name: str, by: str, case: Case, judge: Judge, device: torch.device, timed: Callable[..., Any]) -> None:
    step = next((step for step in steps(case, device, judge.state) if step.name == name), None)
    if step is None or by not in step.timed:
        pytest.skip(f"there is no {by} {name} of {case.name}")
    assert relative_error(step.checked[by]()(), step.exact()()) <= TOLERANCE
    timed(step.timed[by]())
