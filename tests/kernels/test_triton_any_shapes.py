"""The Triton operators against those in ATen, in shapes and layouts that nobody chose."""

from typing import Any

import pytest

pytest.importorskip("hypothesis")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.triton_shared import INTERPRETED, LAYOUTS, check, laid_out, problem

pytestmark = pytest.mark.core


@st.composite
def problems(draw: Any) -> tuple[list, list]:
    """(inputs, u) of any shape and layout."""
    side = st.integers(1, 9)
    features = st.lists(st.tuples(st.integers(1, 40), side, side), min_size=1, max_size=3)
    layouts = st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=3)
    sources, targets = draw(features), draw(features)
    pair = st.tuples(st.integers(0, len(sources) - 1), st.integers(0, len(targets) - 1))
    pairs = draw(st.lists(pair, min_size=1, max_size=4))
    inputs, u = problem((sources, targets, pairs), batch=draw(st.integers(1, 5)))
    return laid_out(inputs, draw(layouts), draw(layouts)), u


# A GPU compiles the kernels anew for every example, and the interpreter is too slow to look for a smaller one.
@settings(max_examples=25 if INTERPRETED else 5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(problems())
def test_any_shapes(drawn: tuple[list, list]) -> None:
    check(*drawn)
