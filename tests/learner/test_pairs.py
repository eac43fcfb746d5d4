"""Which pairs each rule gives, on shapes alone."""

import pytest

from l2t_fast.errors import L2TError
from l2t_fast.learner.pairs import Pair, PairSpec, Shape, resolve_pairs

pytestmark = pytest.mark.core

FIRST: list[Shape] = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
SECOND: list[Shape] = [(8, 16, 16), (8, 4, 4)]
TARGET: list[Shape] = [(4, 32, 32), (6, 16, 16), (8, 8, 8), (9, 4, 4)]


def test_all_to_all_is_every_layer_of_every_source_with_every_target_layer() -> None:
    pairs = resolve_pairs("all-to-all", [FIRST, SECOND], TARGET)
    assert pairs == [(s, m, n) for s, layers in ((0, 3), (1, 2)) for m in range(layers) for n in range(4)]
    assert all(isinstance(pair, Pair) for pair in pairs)


def test_single_is_the_last_layer_of_each_source_with_the_last_of_the_target() -> None:
    assert resolve_pairs("single", [FIRST, SECOND], TARGET) == [(0, 2, 3), (1, 1, 3)]


def test_one_to_one_joins_layers_of_equal_resolution_whatever_their_channels() -> None:
    assert resolve_pairs("one-to-one", [FIRST, SECOND], TARGET) == [
        (0, 0, 0),
        (0, 1, 1),
        (0, 2, 2),
        (1, 0, 1),
        (1, 1, 3),
    ]


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ([8, 8, 8], [8, 8], [(0, 1, 0), (0, 2, 1)]),  # the deepest ones have the better features
        ([8], [16, 8, 8, 4], [(0, 0, 2)]),
        ([16, 8, 8], [16, 16, 8], [(0, 0, 1), (0, 2, 2)]),
        ([8, 4], [4, 8], [(0, 0, 1), (0, 1, 0)]),
    ],
)
def test_one_to_one_takes_each_layer_once_from_the_deepest_up(
    source: list[int], target: list[int], expected: list[tuple[int, int, int]]
) -> None:
    assert resolve_pairs("one-to-one", [[(3, h, h) for h in source]], [(5, h, h) for h in target]) == expected


def test_equal_resolution_means_height_and_width() -> None:
    assert resolve_pairs("one-to-one", [[(1, 8, 4), (1, 4, 8)]], [(1, 4, 8), (1, 8, 8)]) == [(0, 1, 0)]


def test_a_list_keeps_its_order_and_m_n_is_meant_for_every_source() -> None:
    assert resolve_pairs([(1, 3), (0, 0)], [FIRST, SECOND], TARGET) == [(0, 1, 3), (1, 1, 3), (0, 0, 0), (1, 0, 0)]
    assert resolve_pairs([(1, 0, 2), (0, 2, 1)], [FIRST, SECOND], TARGET) == [(1, 0, 2), (0, 2, 1)]
    assert resolve_pairs([], [FIRST], TARGET) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("all", r"pairs='all' is unknown: use 'all-to-all', 'one-to-one', 'single' or a list"),
        ([(3, 0, 0)], r"\(3, 0, 0\) .* out of range: there is no source 3, 2 given"),
        ([(-1, 0, 0)], r"\(-1, 0, 0\) .* no source -1"),
        ([(1, 2, 0)], r"\(1, 2, 0\) .* no source layer 2, 2 given"),
        ([(2, 0)], r"\(1, 2, 0\) .* no source layer 2"),  # the second source has two layers only
        ([(0, -1, 0)], r"no source layer -1"),
        ([(0, 0, 4)], r"\(0, 0, 4\) .* no target layer 4, 4 given"),
        ([(0, -4)], r"no target layer -4"),
        ([(0, 0, 1), (0, 1, 1), (0, 0, 1)], r"\(0, 0, 1\) is given more than once"),
        ([(1, 1, 2), (1, 2), (1, 1, 3)], r"\(1, 1, 2\) is given more than once"),
        ([(0, 0, 0, 0)], r"\(0, 0, 0, 0\) has 4 numbers: give \(m, n\) or \(source, m, n\)"),
        ([(0,)], r"\(0,\) has 1 numbers"),
    ],
)
def test_bad_pairs(spec: PairSpec, message: str) -> None:
    with pytest.raises(L2TError, match=message):
        resolve_pairs(spec, [FIRST, SECOND], TARGET)


def test_one_to_one_without_equal_resolutions_says_which_there_are() -> None:
    with pytest.raises(L2TError, match=r"no layers of equal resolution: source 1 has 5x7, the target 32x32, 16x16"):
        resolve_pairs("one-to-one", [FIRST, [(3, 5, 7)]], TARGET)
