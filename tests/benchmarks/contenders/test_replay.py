"""What is checked of a captured engine is a replay. A stand-in for CUDA graphs runs the iteration again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.contenders import ways
from benchmarks.contenders.judge import Judge
from benchmarks.contenders.ways import Way
from benchmarks.report.columns import SECTIONS, notes, table
from benchmarks.suites import iterations
from l2t_fast import Engine
from l2t_fast.engine import capture
from l2t_fast.engine.capture import Graphs
from tests.shared import SMALL_CASE

CPU = torch.device("cpu")
GRAPH = Way(mode="graph")


class Again:
    """In place of `capture.CudaGraph`: runs the function at each replay."""

    before: Callable[[], None] = staticmethod(lambda: None)  # what a wrong one does before it

    def __init__(self, function: Callable[[], object], stream: Any, pool: Any) -> None:
        self._function = function

    def replay(self) -> None:
        self.before()
        self._function()


def capturing(*args: Any, mode: str, **options: Any) -> Engine:
    """An engine on the CPU that captures in mode "graph"."""
    engine = Engine(*args, mode="eager", **options)
    if mode == "graph":
        engine.mode = "graph"
        engine._new_graphs = lambda: Graphs(engine._iterate, CPU, engine._may_be_captured)  # type: ignore[method-assign]
        engine._graphs = engine._new_graphs()
    return engine


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(SMALL_CASE, CPU, batches=1)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "CudaGraph", Again)
    monkeypatch.setattr(ways, "Engine", capturing)


def made(judge: Judge, way: Way = GRAPH) -> ways.Contender:
    return ways.contender(way, SMALL_CASE, judge.state, CPU, False, None)


def test_the_checked_step_is_a_replay(judge: Judge) -> None:
    one = made(judge)
    for seed in range(2):
        gradient = one.meta_gradient(*SMALL_CASE.images(seed, CPU, torch.float32))
        assert one.replayed()
        assert all(g.abs().max() > 0 for name, g in gradient.items() if name.endswith("bias"))
    found = judge.replay(GRAPH, made(judge), SMALL_CASE)
    assert found["replayed"]
    assert found["correct"]
    assert found["error_replay"] < 5e-6


def test_launches_alone_are_not_correct(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when an engine drops its graphs where its state is loaded."""
    load = Engine.load_state_dict

    def dropping(self: Engine, state: dict[str, Any]) -> None:
        load(self, state)
        self._graphs = self._new_graphs()

    one = made(judge)
    monkeypatch.setattr(Engine, "load_state_dict", dropping)
    found = judge.replay(GRAPH, one, SMALL_CASE)
    assert not found["replayed"]
    assert not found["correct"]
    assert "no replay" in notes(found)


def test_a_wrong_replay_is_seen(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes with another learning rate, say."""
    engines: list[Engine] = []

    def kept(*args: Any, **options: Any) -> Engine:
        engines.append(capturing(*args, **options))
        return engines[-1]

    monkeypatch.setattr(ways, "Engine", kept)
    one = made(judge)
    monkeypatch.setattr(Again, "before", staticmethod(lambda: engines[0].trained.update.groups[0].lr.fill_(0.01)))
    found = judge.replay(GRAPH, one, SMALL_CASE)
    assert found["replayed"]
    assert not found["correct"]


def test_rows_say_it(judge: Judge) -> None:
    rates = {"copy": 1e10, "fp32": 1e11}
    rows = list(iterations.iteration_rows(SMALL_CASE, [ways.REFERENCE, GRAPH], rates, 1, CPU, judge))
    assert rows[1]["replayed"]
    assert rows[1]["correct"]
    assert rows[1]["speedup_over_reference"] > 0
    assert "replay from launches" in table(SECTIONS["iteration"].columns, rows)
