"""What learned.json says of channel weights, by hand."""

import json
import math

import pytest
import torch

from l2t_fast.training.learned import peakedness


def test_peakedness_of_weights_by_hand() -> None:
    w = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.0, 0.5, 0.0, 0.5]])
    found = peakedness(w.requires_grad_())
    # Entropies 7/4 ln 2 and ln 2; rows in falling order (1/2, 1/4, 1/8, 1/8) and (1/2, 1/2, 0, 0).
    assert found["channels"] == 4
    assert found["effective"] == pytest.approx(math.exp((1.75 + 1) / 2 * math.log(2)) / 4)
    assert found["profile"] == pytest.approx([2.0, 1.5, 0.25, 0.25])
    assert json.loads(json.dumps(found)) == found
    assert peakedness(torch.full((3, 4), 0.25))["effective"] == pytest.approx(1)
    assert peakedness(torch.tensor([[0.5, 0.5, 0.0, 0.0]]))["effective"] == pytest.approx(0.5)
