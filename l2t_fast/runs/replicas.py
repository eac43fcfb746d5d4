"""Trainings that take turns in one process; on a GPU each on a stream of its own, so that what they launch overlaps.

Each has a thread, and one of them runs at a time: after every iteration it hands over to the next. So what belongs to
the process (PyTorch's switches, modules that are lent other forwards, a capture) is never used by two at once; the
generators of random numbers change hands with the turn. Each training computes what it would alone.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from l2t_fast.learner.generators import read_generators, set_generators

Result = TypeVar("Result")
HandOver = Callable[[], None]

_HOST = torch.device("cpu")


def side_by_side(calls: Sequence[Callable[[HandOver], Result]], device: torch.device) -> list[Result | BaseException]:
    """What each call returns, or raises; each calls what it is given wherever another one may go on."""
    ends: list[Any] = [None] * len(calls)
    turns, threads = _Turns(len(calls), device), torch.get_num_threads()

    def live(i: int) -> None:
        torch.set_num_threads(threads)  # of OpenMP and MKL, to which a thread is new
        try:
            with turns.taken(i), _stream_of_its_own(device):
                ends[i] = calls[i](partial(turns.hand_over, i))
        except BaseException as error:
            ends[i] = error

    alive = [threading.Thread(target=live, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in alive:
        thread.start()
    for thread in alive:
        thread.join()
    return ends


def _stream_of_its_own(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(stream)


class _Turns:
    """Whose turn it is, and with what generators each goes on."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._changed = threading.Condition()
        self._left = list(range(count))  # those that are not done, the next one first
        self._generator: torch.Generator | None = None
        if device.type == "cuda":
            torch.cuda.init()  # before it there are no generators
            self._generator = torch.cuda.default_generators[device.index or 0]
        self._start = self._read()

    @contextlib.contextmanager
    def taken(self, who: int) -> Any:
        """From its first turn to its last."""
        self._wait(who)
        before, host = self._start
        # A captured graph draws from the state that was the generator's then: each training keeps one.
        self._set((None if self._generator is None else self._generator.clone_state().graphsafe_get_state(), host))
        try:
            yield
        finally:
            self._set((before, host))
            with self._changed:
                self._left.remove(who)
                self._changed.notify_all()

    def hand_over(self, who: int) -> None:
        """All others that are not done have a turn."""
        if len(self._left) == 1:
            return
        mine = self._read()
        with self._changed:
            self._left.append(self._left.pop(0))
            self._changed.notify_all()
        self._wait(who)
        self._set(mine)

    def _wait(self, who: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._left[0] == who)

    def _read(self) -> tuple[Any, Any]:
        return None if self._generator is None else self._generator.graphsafe_get_state(), read_generators(_HOST)

    def _set(self, states: tuple[Any, Any]) -> None:
        if self._generator is not None:
            self._generator.graphsafe_set_state(states[0])
        set_generators(states[1], _HOST)
