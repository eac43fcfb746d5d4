"""Trainings side by side: a list of tasks that a launcher works off, watched and stopped by who started them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from l2t_fast.errors import Interrupted, MachineError
from l2t_fast.runs.launchers.base import ENDS, Launcher, Task
from l2t_fast.runs.launchers.local import Local
from l2t_fast.runs.progress import Display, StopSignal, TrainingWatch

_LINE_EVERY = 30.0  # seconds between two lines on one training, where there is no terminal
_LOOK_EVERY = 0.5  # seconds after which the user's wish to stop is looked at
_ASK_EVERY = 5.0  # seconds between two times that those under way are asked to stop: one that just began may not hear

AnyTask = TypeVar("AnyTask", bound=Task)


def work_off(
    tasks: Sequence[AnyTask],
    jobs: int,
    threads: int,
    display: Display,
    stop: StopSignal,
    launcher: Launcher | None = None,
) -> list[tuple[AnyTask, str]]:
    """Runs all tasks, `jobs` at a time with `threads` CPU threads each; returns those that failed, and why.

    One that is lost with the process or the machine that ran it is tried once more; where memory ran out, or a process
    was killed, as the system then does, with one less at a time. `launcher`: where they run, by default `Local`.

    Raises:
        Interrupted: the user asked to stop; the tasks under way have saved where they stand.
        MachineError: the disk is full, say: the other tasks under way have been stopped likewise.
    """
    launcher = Local() if launcher is None else launcher
    waiting: list[AnyTask] = list(tasks)
    failed: list[tuple[AnyTask, str]] = []
    again: set[Path] = set()  # folders of those that were lost once
    hindered: str | None = None
    under_way: dict[Path, _UnderWay] = {}
    overall = display.bars.add_task("trainings", total=len(tasks), state=f"0 of {len(tasks)}")
    done, ask_at = 0, 0.0
    by_folder = {task.folder: task for task in tasks}

    def say(text: str) -> None:
        display.console.print(text, highlight=False, soft_wrap=True, markup=False)

    kill = False
    try:
        while waiting or under_way:
            if (stop.asked or hindered) and perf_counter() >= ask_at:
                launcher.stop()
                waiting.clear()
                ask_at = perf_counter() + _ASK_EVERY
            while waiting and len(under_way) < jobs:
                task = waiting.pop(0)
                launcher.start(task, threads)
                under_way[task.folder] = _UnderWay()
            for told_by, what, arguments in launcher.events(_LOOK_EVERY) if under_way else ():
                task = by_folder[told_by.folder]
                if what not in ENDS:
                    under_way[task.folder].follow(what, arguments, display, stop)
                    continue
                under_way.pop(task.folder).clear()
                how, words = _understood(what, arguments[0], stop.asked or hindered is not None)
                if how in ("too large", "lost") and task.folder not in again and not (stop.asked or hindered):
                    jobs = max(1, jobs - 1) if how == "too large" else jobs
                    again.add(task.folder)
                    waiting.append(task)
                    say(f"{task.title}: {words.rstrip('.')}; it is tried once more, with {jobs} side by side")
                    continue
                if how == "hindered":
                    hindered = hindered or f"{task.title}: {words}"
                if how in ("stopped", "hindered"):
                    continue
                done += 1
                display.bars.update(overall, completed=done, state=f"{done} of {len(tasks)}")
                if how != "finished":
                    failed.append((task, words))
                say(f"{task.title}: {words} · {done} of {len(tasks)}")
    except KeyboardInterrupt:
        kill = True
        raise
    finally:
        launcher.close(kill)
        for each in under_way.values():
            each.clear()
        display.bars.remove_task(overall)
    if stop.asked:
        raise Interrupted
    if hindered is not None:
        raise MachineError(hindered)
    return failed


def _understood(what: str, words: str, asked: bool) -> tuple[str, str]:
    """How a task ended, when it is known whether the user asked for it."""
    if what == "stopped" and not asked:
        return "lost", "it was stopped from outside"
    return ("stopped", "") if what == "lost" and asked else (what, words)


@dataclass
class _UnderWay:
    """The bars of a task: one for each training that it has told of, by title."""

    watches: dict[str, TrainingWatch] = field(default_factory=dict)

    def follow(self, what: str, arguments: tuple[Any, ...], display: Display, stop: StopSignal) -> None:
        title, *more = arguments
        if what != "made":
            getattr(self.watches[title], what)(*more)
            return
        if title in self.watches:  # lost with its worker, and begun again
            self.watches[title].clear()
        epochs, batches = more
        self.watches[title] = TrainingWatch(display, stop, title, epochs, batches, _LINE_EVERY)

    def clear(self) -> None:
        for watch in self.watches.values():
            watch.clear()
        self.watches.clear()
