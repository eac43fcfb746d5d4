"""The weight of the first channels, by hand."""

import pytest

from l2t_fast.reports.learned import top_weight


def test_the_weight_on_a_tenth_of_the_channels() -> None:
    assert top_weight([1.0] * 7) == pytest.approx(0.1)  # whatever 10 % of 7 channels are
    assert top_weight([2.0, 1.5, 0.25, 0.25]) == pytest.approx(0.4 * 2 / 4)
    assert top_weight([8.0, 4.0, *[0.5] * 16]) == pytest.approx((8 + 0.8 * 4) / 18)  # 1.8 channels
    assert top_weight([4.0, 0.0, 0.0, 0.0], share=1.0) == pytest.approx(1)
