"""Rates of the device."""

import pytest
import torch

from benchmarks.measure import rates

CPU = torch.device("cpu")


def test_a_floor_is_that_of_the_faster_kind_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU convolutions are the faster, on a GPU products: a floor of the other lies above what can be reached."""
    monkeypatch.setattr(rates, "copy_rate", lambda device: 7.0)
    for products, convolutions in ((3.0, 5.0), (5.0, 3.0)):
        monkeypatch.setattr(rates, "product_rate", lambda precision, device, rate=products: rate)
        monkeypatch.setattr(rates, "convolution_rate", lambda precision, device, rate=convolutions: rate)
        assert rates.device_rates(("fp32", "bf16"), CPU) == {"fp32": 5.0, "bf16": 5.0, "copy": 7.0}


def test_convolutions_of_every_layout_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is that of the fastest: each size, contiguous and channels_last, in the precision that was asked for."""
    seen = []
    convolve = torch.nn.functional.conv2d

    def watched(x: torch.Tensor, w: torch.Tensor, padding: int) -> torch.Tensor:
        seen.append((x.dtype, x.shape[1], w.is_contiguous(), w.is_contiguous(memory_format=torch.channels_last)))
        return convolve(x, w, padding=padding)

    # The second convolution takes the least time, whatever the machine does meanwhile.
    took = iter([4.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(rates, "CONVOLUTIONS", {"cpu": ((1, 8, 4), (1, 16, 2))})
    monkeypatch.setattr(rates.F, "conv2d", watched)
    monkeypatch.setattr(rates, "milliseconds", lambda calls, rounds, device: {"": [next(took)]})
    rate = rates.convolution_rate("bf16", CPU)
    assert seen == [(torch.bfloat16, channels, layout == 0, layout == 1) for channels in (8, 16) for layout in range(2)]
    assert rate == 2e3 * (1 * 8 * 4 * 4) * (8 * 9) / 1.0
