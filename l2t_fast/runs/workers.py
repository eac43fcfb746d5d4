"""Trainings side by side: processes that work off a list of tasks, watched and stopped by the one that started them.

They are spawned: a script that calls this does so under `if __name__ == "__main__":`.
"""

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from l2t_fast.errors import Interrupted, L2TError, MachineError, NoMemoryError, memory_watched
from l2t_fast.files import check_there, make_folder, save_text
from l2t_fast.runs.lock import alone
from l2t_fast.runs.progress import Display, MakeWatch, StopSignal, TrainingWatch, loss_on_host
from l2t_fast.signals import STOPS, held_back

_TELL_EVERY = 0.2  # seconds between two messages on the iterations of one training
_LINE_EVERY = 30.0  # seconds between two lines on one training, where there is no terminal
_KILLED = -9  # what multiprocessing makes of SIGKILL
_GRACE = 3.0  # seconds that a training has to save when the process that started it has ended
_ENDS = ("finished", "failed", "stopped", "hindered", "too large", "broken")  # what a worker says of a task at its end
_LOOK_EVERY = 0.5  # seconds after which the user's wish to stop is looked at


class Task(Protocol):
    """Something to train; it can be pickled."""

    @property
    def title(self) -> str:
        """What the user calls it."""

    @property
    def folder(self) -> Path:
        """Where it writes: one process at a time."""

    @property
    def config_file(self) -> Path:
        """Its settings, which are there as long as the folder of the run is."""

    def run(self, make_watch: MakeWatch) -> str:
        """Trains, and says in a few words what came out; at once if it is done already."""


AnyTask = TypeVar("AnyTask", bound=Task)


@contextlib.contextmanager
def at_work(task: Task, stopped: Callable[[], bool]) -> Iterator[None]:
    """Makes the folder of a task, in that of its run, and holds it alone.

    Raises:
        Interrupted, L2TError, MachineError: as `alone`; the folder of the run was removed; memory ran out.
    """
    check_there(task.config_file)
    make_folder(task.folder)
    with alone(task.folder, stopped), memory_watched():
        yield


def work_off(
    tasks: Sequence[AnyTask], jobs: int, threads: int, display: Display, stop: StopSignal
) -> list[tuple[AnyTask, str]]:
    """Runs all tasks, `jobs` at a time with `threads` CPU threads each; returns those that failed, and why.

    One whose process is killed, as the system does when memory runs out, is tried once more, with one less at a time.

    Raises:
        Interrupted: the user asked to stop; the tasks under way have saved where they stand.
        MachineError: the disk is full, say: the other tasks under way have been stopped likewise.
    """
    waiting: list[AnyTask] = list(tasks)
    failed: list[tuple[AnyTask, str]] = []
    again: list[AnyTask] = []  # were killed once, or found too little memory
    hindered: str | None = None
    context = multiprocessing.get_context("spawn")
    asked = context.RawValue("b", 0)  # without a lock, which a process killed inside it would keep
    workers: list[_Worker[AnyTask]] = []
    overall = display.bars.add_task("trainings", total=len(tasks), state=f"0 of {len(tasks)}")
    done = 0
    try:
        while waiting or any(worker.task for worker in workers):
            if stop.asked:
                asked.value = 1
                waiting.clear()
            while waiting and sum(worker.task is not None for worker in workers) < jobs:
                for worker in [w for w in workers if w.task is None and not w.process.is_alive()]:
                    workers.remove(worker)
                idle = [worker for worker in workers if worker.task is None]
                if not idle:
                    idle = [_Worker[AnyTask].started(context, asked, threads)]
                    workers += idle
                idle[0].give(waiting.pop(0))
            busy = {worker.connection: worker for worker in workers if worker.task is not None}
            for connection in wait(list(busy), timeout=_LOOK_EVERY):
                worker = busy[connection]  # type: ignore[index]
                try:
                    kind, arguments = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    workers.remove(worker)
                    kind, arguments = _ended(worker.process.exitcode)
                if kind not in _ENDS:
                    worker.follow(kind, arguments, display, stop)
                    continue
                task, (told,) = worker.finished(), arguments
                if kind in ("broken", "too large") and worker in workers:
                    workers.remove(worker)
                if kind == "too large" and task not in again and not stop.asked:
                    jobs = max(1, jobs - 1)
                    again.append(task)
                    waiting.append(task)
                    _say(display, f"{task.title}: {told.rstrip('.')}; it is tried once more, with {jobs} side by side")
                    continue
                if kind == "hindered":
                    hindered = hindered or f"{task.title}: {told}"
                    asked.value = 1
                    waiting.clear()
                if kind in ("stopped", "hindered"):
                    continue
                done += 1
                display.bars.update(overall, completed=done, state=f"{done} of {len(tasks)}")
                if kind != "finished":
                    failed.append((task, told))
                _say(display, f"{task.title}: {told} · {done} of {len(tasks)}")
    except KeyboardInterrupt:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        asked.value = 1
        for worker in workers:
            worker.connection.close()  # an idle one ends
            worker.process.join()
        display.bars.remove_task(overall)
    if stop.asked:
        raise Interrupted
    if hindered is not None:
        raise MachineError(hindered)
    return failed


def _say(display: Display, line: str) -> None:
    display.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _ended(code: int | None) -> tuple[str, tuple[str]]:
    """What a worker would have told that has ended with this code."""
    if code == _KILLED:
        why = "its process was killed, which the system usually does when memory runs out"
        return "too large", (f"{why}: give fewer --jobs, or a smaller --batch-size",)
    return "failed", (f"its process ended with code {code}",)


@dataclass
class _Worker(Generic[AnyTask]):
    """One process, as its parent sees it."""

    process: Any
    connection: Connection
    task: AnyTask | None = None
    watches: list[TrainingWatch] = field(default_factory=list)

    @classmethod
    def started(cls, context: Any, asked: Any, threads: int) -> "_Worker[AnyTask]":
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, asked, os.getpid(), threads))
        # The parent says when to stop: what the terminal or a scheduler sends to all processes is not for this one.
        try:
            with held_back():
                process.start()
        except OSError as error:
            raise MachineError(f"no process can be started ({error.strerror}): give fewer --jobs.") from error
        theirs.close()
        return cls(process, ours)

    def give(self, task: AnyTask) -> None:
        self.task = task
        with contextlib.suppress(OSError):  # it has ended, which the next look finds
            self.connection.send(task)

    def follow(self, event: str, arguments: tuple[Any, ...], display: Display, stop: StopSignal) -> None:
        if event == "made":
            title, epochs, batches = arguments
            self.watches.append(TrainingWatch(display, stop, title, epochs, batches, _LINE_EVERY))
        else:
            getattr(self.watches[-1], event)(*arguments)

    def finished(self) -> AnyTask:
        for watch in self.watches:
            watch.clear()
        assert self.task is not None
        task, self.task, self.watches = self.task, None, []
        return task


def _work(connection: Connection, asked: Any, parent: int, threads: int) -> None:
    """The life of a worker: tasks, until the parent hangs up."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)

    def stopped() -> bool:
        return bool(asked.value) or os.getppid() != parent

    while True:
        try:
            task: Task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            with at_work(task, stopped):
                end = "finished", task.run(functools.partial(_RemoteWatch, connection, stopped))
        except Interrupted:
            end = "stopped", ""
        except NoMemoryError as error:
            end = "too large", str(error)
        except MachineError as error:
            end = "hindered", str(error)
        except L2TError as error:
            end = "failed", str(error)
        except Exception as error:  # whatever a training may raise: the others go on, in a new process
            with contextlib.suppress(L2TError):  # the disk is full: the parent is told all the same
                save_text(task.folder / "error.txt", traceback.format_exc())
            end = "broken", f"{type(error).__name__}, see {task.folder / 'error.txt'}"
        try:
            connection.send((end[0], (end[1],)))
        except OSError:  # the parent is gone
            return
        if end[0] in ("broken", "too large"):  # an error on a GPU spoils the process
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


class _RemoteWatch:
    """The `RunWatch` of a worker: tells the parent what its `TrainingWatch` wants to know."""

    def __init__(self, connection: Connection, stopped: Callable[[], bool], title: str, epochs: int, batches: int):
        self._connection, self.stop_asked = connection, stopped
        self._count, self._last = 0, perf_counter()
        self._tell("made", title, epochs, batches)

    def preparing(self, what: str) -> None:
        self._tell("preparing", what)

    def begins(self, batches: int) -> None:
        self._tell("begins", batches)

    def _tell(self, event: str, *arguments: Any) -> None:
        with contextlib.suppress(OSError):  # the parent is gone, which `stop_asked` finds
            self._connection.send((event, arguments))

    def resumed(self, epoch: int, iteration: int) -> None:
        self._tell("resumed", epoch, iteration)

    def iteration(self, epoch: int, metrics: dict[str, Tensor]) -> None:
        self._count += 1
        if perf_counter() - self._last > _TELL_EVERY:
            self._advanced(epoch, loss_on_host(metrics))

    def _advanced(self, epoch: int, loss: float | None) -> None:
        self._tell("advanced", self._count, epoch, loss)
        self._count, self._last = 0, perf_counter()

    def evaluating(self, part: str) -> None:
        self._tell("evaluating", part)

    def epoch(self, row: dict[str, Any]) -> None:
        self._advanced(row["epoch"], row["loss"])
        self._tell("epoch", {key: row[key] for key in ("epoch", "loss", "val_accuracy") if key in row})

    def say(self, text: str) -> None:
        self._tell("say", text)

    def done(self, accuracy: float) -> None:
        self._tell("done", accuracy)
