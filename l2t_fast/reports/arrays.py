"""Numbers of several seeds in one array."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def ragged(rows: Sequence[Sequence[float]]) -> Array:
    """[rows, longest]: what a shorter row lacks is nan."""
    values = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for line, row in zip(values, rows, strict=True):
        line[: len(row)] = row
    return values
