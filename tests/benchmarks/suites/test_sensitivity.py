"""What a meta-gradient carries."""

import pytest
import torch

from benchmarks.suites import sensitivity
from tests.shared import batch, engine


def test_sensitivity_finds_dead_pairs_and_the_share_of_the_matching_loss() -> None:
    small = engine(lr=0.02)
    with torch.no_grad():
        small.learner.where[0].bias.fill_(-1e3)  # λ = 0 on every image
        small.learner.where[1].bias.fill_(1e3)  # λ = 6
    row = sensitivity.measure(small, [batch(i) for i in range(3)])
    assert row["dead"] == pytest.approx(2 / 15)
    assert (row["at_0"], row["at_6"]) == (pytest.approx(1 / 15), pytest.approx(1 / 15))
    assert row["pair_weights"][:2] == [0, 6]
    assert -1 <= row["cosine"] <= 1
    assert row["noise"] > 0
    assert 0 < row["share"] < 1
    strong = engine(small.learner, lr=0.02, beta=10 * small.beta)
    assert sensitivity.measure(strong, [batch(i) for i in range(2)])["share"] == pytest.approx(
        10 * row["share"] / (1 + 9 * row["share"])  # the norm of the matching loss's gradient is 10 times as large
    )
    same = sensitivity.measure(small, [batch(0), batch(0)])
    assert same["cosine"] == pytest.approx(1)
