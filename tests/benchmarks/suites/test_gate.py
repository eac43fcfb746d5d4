"""The regression gate: that nothing became worse, and that it sees what does."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.measure.traffic import _counted, traffic
from benchmarks.suites import gate
from l2t_fast import L2T
from l2t_fast.kernels.layers import pending
from l2t_fast.learner.network import Network
from tests.shared import SMALL_CASE


def test_nothing_became_worse() -> None:
    """If that is meant: `python -m benchmarks gate --update`, and look at what changed."""
    expected = json.loads(gate.EXPECTATIONS.read_text())
    assert gate.complaints(gate.measure(), expected) == []


@pytest.fixture(scope="module")
def expected_counts() -> dict[str, int]:
    return gate.engine_counts(SMALL_CASE)


def _complaints(counts_now: dict[str, int], expected: dict[str, int]) -> list[str]:
    measured = {"counts": {"tiny": counts_now}, "time": {}, "imagenet": {}}
    return gate.complaints(measured, {"counts": {"tiny": expected}})


def test_gate_sees_a_second_source_pass(expected_counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    once = L2T.source_features

    def twice(self: L2T, *args: Any) -> list[torch.Tensor]:
        once(self, *args)
        return once(self, *args)

    monkeypatch.setattr(L2T, "source_features", twice)
    found = _complaints(gate.engine_counts(SMALL_CASE), expected_counts)
    assert any("flops" in complaint for complaint in found)
    assert any("launches" in complaint for complaint in found)


def test_gate_sees_more_memory(expected_counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    forward, kept = Network.run, []

    def hoarding(self: Network, *args: Any, **options: Any) -> Any:
        kept.append(torch.zeros(expected_counts["saved_bytes"] // 40))
        return forward(self, *args, **options)

    monkeypatch.setattr(Network, "run", hoarding)
    found = _complaints(gate.engine_counts(SMALL_CASE), expected_counts)
    assert any("saved_bytes" in complaint for complaint in found)


def test_gate_sees_more_traffic_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of BatchNorms that no longer wait for their ReLU, for one."""
    before = {"tf32": traffic(SMALL_CASE, "tf32")}
    assert gate.complaints({"cuda": before, "time": {}, "imagenet": {}}, {"cuda": before}) == []
    monkeypatch.setattr(pending, "may_wait", lambda x: False)
    now = {"tf32": traffic(SMALL_CASE, "tf32")}
    found = gate.complaints({"cuda": now, "time": {}, "imagenet": {}}, {"cuda": before})
    assert any("launches" in complaint for complaint in found)
    assert any("bytes" in complaint for complaint in found)


def test_traffic_is_affine_in_the_batch() -> None:
    case = replace(SMALL_CASE, batch=7)
    told, counted = traffic(case, "bf16"), _counted(case, "bf16")
    assert told["launches"] == counted.launches.total()
    assert told["bytes"] == pytest.approx(counted.bytes.total(), rel=1e-3)


@pytest.mark.parametrize(("times", "red"), [(1.0, False), (1.1, False), (2.0, True)])
def test_gate_sees_lost_time_beyond_noise(times: float, red: bool) -> None:
    before = [0.5, 0.52, 0.54, 0.55, 0.56, 0.58, 0.6, 0.62, 0.9]
    expected = {"time": {"tiny": vars(gate.interval(before))}, "counts": {}}
    measured = {
        "time": {"tiny": vars(gate.interval([times * ratio for ratio in before]))},
        "counts": {},
        "imagenet": {},
    }
    assert bool(gate.complaints(measured, expected)) is red


def test_gate_sees_flops_of_the_imagenet_case() -> None:
    good = {"counts": {}, "time": {}, "imagenet": {"step": 12.2, "meta_gradient": 10.3}}
    assert gate.complaints(good, {}) == []
    bad = {"counts": {}, "time": {}, "imagenet": {"step": 12.4, "meta_gradient": float("nan")}}
    assert len(gate.complaints(bad, {})) == 2
