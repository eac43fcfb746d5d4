"""What a data set holds, read by processes; one that is killed is replaced, and its batch read again."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from multiprocessing.context import BaseContext
from multiprocessing.sharedctypes import RawValue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from l2t_fast.errors import L2TError, LostWorkerError, ReadError
from l2t_fast.signals import held_back, leave_group

_OURS = "L2TError: "  # a worker's message comes wrapped in its traceback
_RAISED = "Caught "  # how PyTorch begins what code in a worker has raised


def load(dataset: Dataset[Any], batches: int | Sequence[range], workers: int, pin: bool = False) -> Iterator[Any]:
    """`dataset` in batches, by so many `workers`; with `pin` in memory that a GPU can read.

    Args:
        batches: the indices of each; or their size, to have all in order.

    Raises:
        ReadError: an item cannot be read.
        LostWorkerError: a process was killed, or could not be started, twice at the same batch.
    """
    if isinstance(batches, int):
        size, end = batches, len(dataset)  # type: ignore[arg-type]
        batches = [range(begin, min(begin + size, end)) for begin in range(0, end, size)]
    done, lost_at = 0, -1
    while True:
        rest = batches[done:]
        try:
            for batch in _read(dataset, rest, workers, pin):
                yield batch
                done += 1
            return
        except L2TError as error:
            raise ReadError(str(error).strip().rpartition(_OURS)[2]) from None
        except (RuntimeError, OSError, EOFError) as error:  # whatever is left in a pipe by a process that was killed
            if not workers or str(error).startswith(_RAISED):
                raise
            if lost_at == done:
                why = str(error).partition("\n")[0]
                raise LostWorkerError(
                    f"processes that read images end again and again ({why}), which the system usually does to them "
                    "when memory runs out: give fewer --workers."
                ) from error
            lost_at = done


def _read(dataset: Dataset[Any], batches: Sequence[range], workers: int, pin: bool) -> Iterator[Any]:
    workers = min(workers, len(batches))  # none without a batch
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context=_without_event_lock() if workers else None,
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # otherwise the loader draws from the global one
    )
    with held_back(), _deaths_unheard():
        loaded = iter(loader)
    yield from loaded


class _Flag:
    """What a loader needs of multiprocessing.Event, without its lock. A worker asks it at each batch, and one that is
    killed while it holds the lock would have the loader wait for it for ever."""

    def __init__(self) -> None:
        self._flag = RawValue("b", 0)

    def set(self) -> None:
        self._flag.value = 1

    def is_set(self) -> bool:
        return bool(self._flag.value)


def _without_event_lock() -> BaseContext:
    context = copy(multiprocessing.get_context())
    context.Event = _Flag  # type: ignore[assignment, method-assign]
    return context


def _leave_group(_worker: int) -> None:
    leave_group()


@contextmanager
def _deaths_unheard() -> Iterator[None]:
    """Takes away the handler by which PyTorch raises at the death of a worker wherever the program stands, be it in the
    midst of writing θ; the next batch that is waited for finds it as well, within seconds."""
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if before is not None:  # it is not Python's
            signal.signal(number, before)
