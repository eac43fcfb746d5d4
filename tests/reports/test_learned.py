"""The weight of the first channels, by hand; files of what was learned that were edited."""

import json
from pathlib import Path
from typing import Any

import pytest

from l2t_fast.errors import L2TError
from l2t_fast.reports.learned import read_learned, top_weight
from tests.reports.shared import training


def test_the_weight_on_a_tenth_of_the_channels() -> None:
    assert top_weight([1.0] * 7) == pytest.approx(0.1)  # whatever 10 % of 7 channels are
    assert top_weight([2.0, 1.5, 0.25, 0.25]) == pytest.approx(0.4 * 2 / 4)
    assert top_weight([8.0, 4.0, *[0.5] * 16]) == pytest.approx((8 + 0.8 * 4) / 18)  # 1.8 channels
    assert top_weight([4.0, 0.0, 0.0, 0.0], share=1.0) == pytest.approx(1)


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": 1},
        {"pairs": ["a"]},
        {"source": [1, 2]},
        {"target": "ab"},
        {"pair_weights": ["1", "2"]},
        {"pair_weights": [1.0]},
        {"pair_weights": [1.0, float("nan")]},
        {"channels": [3, 4]},
        {"channels": [{}, {}]},
        {"channels": [{"effective": 1.0, "profile": []}] * 2},
        {"channels": [{"effective": "x", "profile": [1.0]}] * 2},
        {"channels": [{"effective": 1.0, "profile": ["x"]}] * 2},
    ],
)
def test_what_was_learned_and_then_edited_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    cell = tmp_path / "l2t-ww/seed-0"
    channels = [{"channels": 2, "effective": 1.0, "profile": [1.0, 1.0]}] * 2
    training(cell, [[1.0, 2.0], [1.5, 2.5]], final=[1.5, 2.5], channels=channels)
    assert len(read_learned(tmp_path)) == 1
    content = json.loads((cell / "learned.json").read_text())
    (cell / "learned.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(L2TError, match=r"learned.json is not what a training writes: train it anew"):
        read_learned(tmp_path)
