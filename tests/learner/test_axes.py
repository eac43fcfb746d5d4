"""The algebra of axes, where whole networks would hide a fault."""

import pytest

from l2t_fast.learner.axes import Axes, Axis, Factor, agreed, every, unknown, viewed

B, H, W, C = every("B", 2), every("H", 8), every("W", 6), unknown(5)


def test_operands_complete_each_other() -> None:
    assert agreed(unknown(8), H) == agreed(H, unknown(8)) == agreed(H, H) == H
    assert agreed((*B, *unknown(8)), (*unknown(2), *H)) == (*B, *H)
    assert agreed((*B, *unknown(40)), (*unknown(10), *H)) == (*B, *unknown(5), *H)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (H, every("W", 8)),
        ((*unknown(3), *H), (*H, *unknown(3))),
        ((*H, *W), (*W, *H)),
        (H, (Factor("H", 8, step=1, whole=16),)),
    ],
)
def test_operands_that_differ_tell_nothing(a: Axis, b: Axis) -> None:
    size = 1
    for factor in a:
        size *= factor.size
    assert agreed(a, b) == agreed(b, a) == unknown(size)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ((B, C, H, W), (2, 5, 48), (B, C, (*H, *W))),
        ((B, C, (*H, *W)), (2, 5, 8, 6), (B, C, H, W)),
        ((B, H, C), (2, 2, 4, 5), (B, (Factor("H", 2, 4, 8),), (Factor("H", 4, 1, 8),), C)),
        ((B, (Factor("H", 2, 4, 8),), (Factor("H", 4, 1, 8),), C), (2, 8, 5), (B, H, C)),
        (
            (B, (Factor("H", 4, 1, 8),), (Factor("H", 2, 4, 8),)),
            (2, 8),
            (B, (Factor("H", 4, 1, 8), Factor("H", 2, 4, 8))),
        ),
        ((B, C, every("H", 1), W), (2, 5, 6), (B, C, (*every("H", 1), *W))),
        ((B, C, H, every("W", 1)), (2, 5, 8), (B, C, (*H, *every("W", 1)))),
        ((B, C, every("H", 1), every("W", 1)), (2, 5, 1), (B, C, (*every("H", 1), *every("W", 1)))),
        ((B, every("H", 1), every("W", 1), C), (2, 1, 5), (B, (*every("H", 1), *every("W", 1)), C)),
        ((B, C, H), (2, 8, 5), (B, unknown(8), unknown(5))),  # not a transpose: nothing lies on anything
        ((B, C, H), (2, 0), (unknown(2), unknown(0))),
    ],
)
def test_views(axes: Axes, shape: tuple[int, ...], expected: Axes) -> None:
    assert viewed(axes, shape) == expected
