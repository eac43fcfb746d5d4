"""What a launcher is given and what it tells; a task carried out wherever it was sent.

Every launcher needs the folder of the run, the data and this library under the same paths wherever a task may run: a
shared file system. What a training tells goes back as events, (what, its arguments), the last of which says how it
ended:

finished, failed   and in words what came out, or why
stopped            it was asked to, and has saved
hindered           the disk is full, say: it would be so for the others, too
too large          memory ran out, or its process was killed, as the system then does: fewer side by side may help
lost               the machine or the job that ran it went away
"""

import contextlib
import functools
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from l2t_fast.errors import Interrupted, L2TError, MachineError, NoMemoryError, memory_watched
from l2t_fast.files import check_there, make_folder, save_text
from l2t_fast.ranks import current
from l2t_fast.runs.lock import alone
from l2t_fast.runs.progress import MakeWatch, loss_on_host
from l2t_fast.signals import STOPS

ENDS = ("finished", "failed", "stopped", "hindered", "too large", "lost")
Tell = Callable[[str, tuple[Any, ...]], None]

_TELL_EVERY = 0.2  # seconds between two messages on the iterations of one training


class Task(Protocol):
    """Something to train; it can be pickled. One that writes in several folders has them as `folders`."""

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


class Launcher(Protocol):
    """Runs tasks elsewhere. After `close` it may be given others."""

    def start(self, task: Task, threads: int) -> None:
        """Sends a task on its way, to be run with so many CPU threads."""

    def events(self, seconds: float) -> list[tuple[Task, str, tuple[Any, ...]]]:
        """What tasks under way have told since; waits so long at most for the first."""

    def stop(self) -> None:
        """Asks all under way to save and end; it may be repeated."""

    def close(self, kill: bool) -> None:
        """Nothing is under way any more, or is to be; `kill`: at once."""


@contextlib.contextmanager
def at_work(task: Task, stopped: Callable[[], bool]) -> Iterator[None]:
    """Makes the folder of a task, in that of its run, and holds it alone; of several, all. Rank 0 does, for all ranks.

    Raises:
        Interrupted, L2TError, MachineError: as `alone`; the folder of the run was removed; memory ran out.
    """
    folders: Sequence[Path] = getattr(task, "folders", (task.folder,)) if current().leads else ()
    with contextlib.ExitStack() as stack:
        if folders:
            check_there(task.config_file)
        for folder in folders:
            make_folder(folder)
            stack.enter_context(alone(folder, stopped))
        stack.enter_context(memory_watched())
        yield


def carry_out(task: Task, stopped: Callable[[], bool], tell: Tell) -> tuple[str, str, bool]:
    """Runs a task: (how it ended, in words, whether this process is still good for another one)."""
    try:
        with at_work(task, stopped):
            return "finished", task.run(functools.partial(_RemoteWatch, tell, stopped)), True
    except Interrupted:
        return "stopped", "", True
    except NoMemoryError as error:
        return "too large", str(error), False
    except MachineError as error:
        return "hindered", str(error), True
    except L2TError as error:
        return "failed", str(error), True
    except Exception as error:  # whatever a training may raise: the others go on, in a new process
        with contextlib.suppress(L2TError):  # the disk is full: who started it is told all the same
            save_text(task.folder / "error.txt", traceback.format_exc())
        # An error on a GPU spoils the process.
        return "failed", f"{type(error).__name__}, see {task.folder / 'error.txt'}", False


def carry_out_there(task: Task, threads: int, folder: str, tell: Tell) -> tuple[str, str]:
    """`carry_out` in the main thread of a process that is another's: a signal to stop lets the training save.

    Args:
        folder: the working folder of who sent the task, from which its paths count.
    """
    asked: list[int] = []
    try:
        os.chdir(folder)
    except OSError:
        where = socket.gethostname()
        return "failed", f"{where} has no folder {folder}: start the table where all machines have the same files."
    torch.set_num_threads(threads)
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in STOPS}
    try:
        how, words, _ = carry_out(task, lambda: bool(asked), tell)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return how, words


class _RemoteWatch:
    """The `RunWatch` of a training elsewhere: tells what a `TrainingWatch` wants to know, its title first."""

    def __init__(self, tell: Tell, stopped: Callable[[], bool], title: str, epochs: int, batches: int):
        self._tell_of, self.stop_asked, self._title = tell, stopped, title
        self._count, self._last = 0, perf_counter()
        self._tell("made", epochs, batches)

    def preparing(self, what: str) -> None:
        self._tell("preparing", what)

    def begins(self, batches: int) -> None:
        self._tell("begins", batches)

    def _tell(self, what: str, *arguments: Any) -> None:
        self._tell_of(what, (self._title, *arguments))

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
