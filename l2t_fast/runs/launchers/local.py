"""Processes of this machine, which take one task after the other.

They are spawned: a script that calls this does so under `if __name__ == "__main__":`.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from time import sleep
from typing import Any

import torch

from l2t_fast.errors import MachineError
from l2t_fast.runs.launchers.base import Task, carry_out
from l2t_fast.signals import STOPS, held_back

_KILLED = -9  # what multiprocessing makes of SIGKILL
_GRACE = 3.0  # seconds that a training has to save when the process that started it has ended


@dataclass
class _Worker:
    """One process, as its parent sees it."""

    process: Any
    connection: Connection
    device: str | None
    task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(OSError):  # it has ended, which the next look finds
            self.connection.send(task)


class Local:
    """The launcher "local".

    Args:
        devices: the GPUs, as CUDA_VISIBLE_DEVICES names them, among which the processes are divided; none on a CPU.
    """

    def __init__(self, devices: Sequence[str] = ()) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._devices = devices
        self._workers: list[_Worker] = []
        self._asked = self._context.RawValue("b", 0)  # without a lock, which a process killed inside it would keep

    def start(self, task: Task, threads: int) -> None:
        for worker in [w for w in self._workers if w.task is None and not w.process.is_alive()]:
            self._workers.remove(worker)
        idle = next((worker for worker in self._workers if worker.task is None), None)
        (idle or self._another(threads)).give(task)

    def _another(self, threads: int) -> _Worker:
        taken = [worker.device for worker in self._workers]
        device = min(self._devices, key=taken.count, default=None)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._asked, os.getpid(), threads, device))
        # The parent says when to stop: what the terminal or a scheduler sends to all processes is not for this one.
        try:
            with held_back():
                process.start()
        except OSError as error:
            raise MachineError(f"no process can be started ({error.strerror}): give fewer --jobs.") from error
        theirs.close()
        self._workers.append(_Worker(process, ours, device))
        return self._workers[-1]

    def events(self, seconds: float) -> list[tuple[Task, str, tuple[Any, ...]]]:
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        found: list[tuple[Task, str, tuple[Any, ...]]] = []
        for connection in wait(list(busy), timeout=seconds):
            worker = busy[connection]  # type: ignore[index]
            task = worker.task
            assert task is not None
            try:
                what, arguments, *ended = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                what, arguments = _ended(worker.process.exitcode)
                ended = [False]
            if ended:
                worker.task = None
                if not ended[0]:
                    self._workers.remove(worker)
            found.append((task, what, arguments))
        return found

    def stop(self) -> None:
        self._asked.value = 1

    def close(self, kill: bool) -> None:
        self._asked.value = 1
        for worker in self._workers:
            if kill:
                worker.process.kill()
            worker.connection.close()  # an idle one ends
            worker.process.join()
        self._workers = []
        self._asked = self._context.RawValue("b", 0)


def _ended(code: int | None) -> tuple[str, tuple[str]]:
    if code != _KILLED:
        return "failed", (f"its process ended with code {code}",)
    why = "its process was killed, which the system usually does when memory runs out: give fewer --jobs, or a smaller "
    return "too large", (why + "--batch-size",)


def _work(connection: Connection, asked: Any, parent: int, threads: int, device: str | None) -> None:
    """The life of a worker: tasks, until the parent hangs up."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # in time: CUDA reads it when it is first used
    torch.set_num_threads(threads)

    def stopped() -> bool:
        return bool(asked.value) or os.getppid() != parent

    def tell(*event: Any) -> None:
        with contextlib.suppress(OSError):  # the parent is gone, which `stopped` finds
            connection.send(event)

    while True:
        try:
            task: Task = connection.recv()
        except (EOFError, OSError):
            return
        how, words, good = carry_out(task, stopped, tell)
        try:
            connection.send((how, (words,), good))
        except OSError:  # the parent is gone
            return
        if not good:
            return
        gc.collect()  # an engine and its graphs hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _end_with_parent() -> None:
    """Ends this process a little after the one that started it, whatever it is doing."""
    if (parent := multiprocessing.parent_process()) is not None:
        wait([parent.sentinel])
    sleep(_GRACE)
    os._exit(1)
