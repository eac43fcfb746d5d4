"""Times of turns."""

from benchmarks.measure import timing


def test_speedup_is_that_of_turns_which_belong_together() -> None:
    base, mine = [10.0, 100.0, 10.0], [5.0, 50.0, 5.0]
    assert timing.speedup(base, mine) == {"speedup": 2, "speedup_p20": 2, "speedup_p80": 2}
    assert timing.summary([3.0, 1.0, 2.0])["ms_median"] == 2
