"""No test goes on for ever."""

import faulthandler
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

SECONDS = 600.0  # the slowest test takes a few minutes on a busy machine


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Fails what takes longer, with the stacks of all threads on stderr, and ends the processes that it has started."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    late = False

    def over(_number: int, _frame: Any) -> None:
        nonlocal late
        late = True
        faulthandler.dump_traceback(file=2)
        _end_children(os.getpid())
        fail()

    def fail() -> None:
        pytest.fail(f"no end after {seconds:g} seconds: the stacks of all threads are on stderr")

    handler = signal.signal(signal.SIGALRM, over)
    # Again and again: Python ignores what is raised in `__del__`, and what comes next may hang as well.
    outer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, handler)
    if late:
        fail()


def _end_children(process: int) -> None:
    """And theirs first."""
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            for child in map(int, path.read_text().split()):
                _end_children(child)
                os.kill(child, signal.SIGKILL)
