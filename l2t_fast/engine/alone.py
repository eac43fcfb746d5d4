"""One iteration at a time in a process, whatever its threads do."""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")

# An iteration sets what the whole process shares: PyTorch's switches, its generators, whether hooks are silent.
_LOCK = threading.RLock()


def one_at_a_time(function: Callable[P, Result]) -> Callable[P, Result]:
    """`function`, waiting until another thread is through with what is decorated likewise."""

    @functools.wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> Result:
        with _LOCK:
            return function(*args, **kwargs)

    return waiting
