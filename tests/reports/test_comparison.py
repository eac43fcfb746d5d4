"""Aggregates and comparisons, against numbers made by hand or by numpy."""

import math

import numpy as np
import pytest

from l2t_fast.reports.comparison import Stat, compare, stat, summarize
from tests.reports.shared import METHODS, column


def test_the_aggregates_are_those_of_numpy() -> None:
    summary = summarize(column(published={"l2t-ww": (70.0, 0.5)}), METHODS)
    ww = summary.standings[2]
    assert ww.best is not None
    assert ww.last is not None
    assert ww.seconds is not None
    assert ww.best.mean == pytest.approx(np.mean([66, 67, 68.5]))
    assert ww.best.std == pytest.approx(np.std([66, 67, 68.5], ddof=1))
    assert ww.last.mean == pytest.approx(np.mean([65, 66, 67.5]))
    assert ww.seconds == Stat(11.0, 1.0, 3)
    assert ww.published == (70.0, 0.5)
    assert summary.metric == "test_accuracy_best"
    assert summary.baseline == "fm-single"  # not l2t-ww, which is better but no baseline
    assert summary.standings[1].comparison is None
    assert [summary.leads(standing) for standing in summary.standings] == [False, False, True]
    assert stat([]) is None
    assert stat([3.0]) == Stat(3.0, None, 1)


def test_p_is_that_of_the_formula_for_two_degrees_of_freedom() -> None:
    ours, theirs = [66.0, 67.0, 68.5], [63.0, 66.0, 63.0]
    found = compare(dict(enumerate(ours)), dict(enumerate(theirs)))
    d = np.subtract(ours, theirs)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(3))
    assert found.difference == pytest.approx(d.mean())
    assert found.p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))
    assert found.pairs == 3
    back = compare(dict(enumerate(theirs)), dict(enumerate(ours)))
    assert back.difference == pytest.approx(-d.mean())
    assert back.p == pytest.approx(found.p)


def test_p_is_undefined_where_there_is_no_spread() -> None:
    same = compare({0: 60.1, 1: 62.3}, {0: 59.1, 1: 61.3})  # in floating point not quite equal
    assert (same.difference, same.p, same.pairs) == (pytest.approx(1.0), None, 2)
    assert "same for every seed" in same.why
    one = compare({0: 60.0, 1: 70.0}, {0: 59.0, 2: 1.0})  # seed 0 alone is common
    assert (one.difference, one.p, one.pairs) == (1.0, None, 1)
    assert "one common seed" in one.why
    none = compare({0: 60.0}, {1: 60.0})
    assert (none.difference, none.p, none.pairs) == (None, None, 0)
