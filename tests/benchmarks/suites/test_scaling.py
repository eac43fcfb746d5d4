"""The model of many GPUs, and all-reduces between processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.measure.links import NETWORKS, RING, AllReduce, turns
from benchmarks.report import markdown
from benchmarks.suites import scaling
from tests.shared import learner, write_rows

SPEED = NETWORKS["8 x InfiniBand 400 Gb/s"]
FOUND = {"compute_ms": 10.0, "compute_by": "iterations timed", "precision": "bf16"}


def test_an_all_reduce_of_a_ring_by_hand() -> None:
    """Two nodes of eight: 30 hops, two of them between nodes; 15/8 of the bytes over the slowest link."""
    ring = AllReduce("ring", 16, SPEED)
    assert ring.latency == pytest.approx(RING.start + 28 * RING.inside + 2 * RING.between)
    assert ring.wire(16e6) == 30e6
    assert ring.transfer(16e6) == pytest.approx(30e6 / 400e9)
    assert AllReduce("ring", 8, SPEED).transfer(8e6) == pytest.approx(14e6 / 450e9)
    alone = AllReduce("tree", 1, SPEED)
    assert (alone.latency, alone.wire(1e6), alone.transfer(1e6)) == (0, 0, 0)
    assert AllReduce("tree", 1024, SPEED).latency < AllReduce("ring", 1024, SPEED).latency / 10


def test_sets_of_gradients_are_those_of_the_iteration() -> None:
    """2T + 3 of θ and one of φ; the classifier has no part in the matching loss, nor r in the others."""
    subject = learner(torch.float32)
    sets = scaling.gradient_sets(subject, 2)
    target, r = (sum(p.numel() for p in part.parameters()) for part in (subject.target, subject.projections))
    classifier = sum(p.numel() for p in subject.target.classifier.parameters())
    assert sets["real step"] == [target + r]
    assert sets["matching steps"] == [target + r - classifier] * 2
    assert sets["sweep"] == [target, target + r - classifier]
    assert sum(map(len, sets.values())) == 2 * 2 + 3 + 1


def test_what_breaks_first_is_said_and_drawn(tmp_path: Path) -> None:
    case = replace(CASES["cifar"], batch=8)
    found = list(scaling.model_rows(case, [250_000] * 7, FOUND))
    weak = [row for row in found if row["kind"] == "scaling" and row["scaling"] == "weak"]
    strong = [row for row in found if row["kind"] == "scaling" and row["scaling"] == "strong"]
    assert {row["gpus"] for row in weak} == set(scaling.GPUS)
    assert {row["gpus"] for row in strong} == {1, 2, 4, 8}  # an image each, at most
    assert all(row["compute_ms"] == 10 / row["gpus"] for row in strong)
    for row in weak:
        assert row["efficiency"] == pytest.approx(10 / (10 + row["latency_ms"] + row["transfer_ms"]))
        if row["gpus"] == 1:
            assert row["efficiency"] == 1
    breaks = {(row["by"], row["network"], row["scaling"]): row for row in found if row["kind"] == "scaling breaks"}
    first = breaks["ring", "8 x InfiniBand 400 Gb/s", "weak"]
    curve = {row["gpus"]: row for row in weak if row["by"] == "ring" and row["network"] == first["network"]}
    assert curve[first["gpus"]]["efficiency"] < 0.9 <= curve[first["gpus"] // 2]["efficiency"]
    assert first["what"] == "latency"
    assert breaks["tree", "100 GbE", "weak"]["what"] == "bytes"
    header = {"kind": "run", "device": "x", "threads": 1, "torch": "2", "commit": "abc", "time": "2026"}
    report = markdown.write(write_rows(tmp_path / "scaling.jsonl", [header, *found]))
    assert "Many GPUs: what breaks first" in report.read_text()
    assert (tmp_path / "scaling/scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "ms", "by"),
    [
        ([{"kind": "iteration", "correct": True, "ms_median": 12.5}], 12.5, "iterations timed"),
        ([{"kind": "iteration", "correct": False, "ms_median": 1.0}], None, "floor: no time was measured"),
        ([{"kind": "breakdown", "family_ms": {"a": 3.0, "b": 4.0}}], 7.0, "kernels profiled"),
    ],
)
def test_compute_says_how_it_is_known(rows: list[dict[str, object]], ms: float, by: str, tmp_path: Path) -> None:
    case = replace(CASES["tiny"], batch=2)
    mine = {"case": "tiny", "batch": 2, "precision": "bf16", "by": "engine", "mode": "graph"}
    rates = {"kind": "rates", "rates": {"copy": 4e12, "bf16": 8e14}}
    path = write_rows(tmp_path / "x.jsonl", [{"kind": "run"}, rates, *({**mine, **row} for row in rows)])
    found = scaling.compute(case, "bf16", path)
    assert found["compute_by"] == by
    assert found["compute_ms"] == ms if ms is not None else 0 < found["compute_ms"] < 1


def test_all_reduces_of_two_processes_are_right() -> None:
    some = turns([[3, 5], [1000]], 2, rounds=2)
    assert [len(mine) for mine in some] == [2, 2]
    assert all(turn.correct and turn.seconds > 0 for mine in some for turn in mine)
    json.dumps(some)
