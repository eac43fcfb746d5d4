"""Counts of one call."""

import torch

from l2t_fast.engine import counts


def test_counts() -> None:
    x = torch.zeros(1000)

    def call() -> torch.Tensor:
        y = (x + 1)[:10].view(2, 5)  # 4000 bytes that stay with y, a launch and two views
        torch.nn.functional.nll_loss(y, torch.tensor([0, 1]))
        return y @ y.T

    found = counts.count(call)
    assert found.flops == 2 * 2 * 5 * 2
    assert 4000 <= found.saved_bytes < 4100
    assert found.launches < found.calls
