"""Live progress in the terminal; a line now and then where the output is no terminal."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from types import FrameType, TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from l2t_fast.errors import Interrupted
from l2t_fast.ranks import current, launched
from l2t_fast.signals import STOPS, exit_code, note
from l2t_fast.training.watch import Watch

_LINE_EVERY = 5.0  # seconds between two lines where there is no terminal


class RunWatch(Watch, Protocol):
    """A watch that also shows what comes before the first iteration, and the end."""

    def preparing(self, what: str) -> None:
        """This is being done ("reading the images")."""

    def begins(self, batches: int) -> None:
        """There are so many batches in an epoch, which were not known before."""

    def done(self, accuracy: float) -> None:
        """The training is over, with this accuracy on the test set."""


MakeWatch = Callable[[str, int, int], RunWatch]  # (title, epochs, batches of an epoch: 0 is not known yet)


class _Speed(ProgressColumn):
    """Iterations a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} it/s" if task.speed else "- it/s", style="progress.data.speed")


class Display:
    """The progress bars of a run: one for each training."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._said: set[str] = set()
        self.bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False),
            _Speed(),
            TextColumn("·"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
        )

    def __enter__(self) -> "Display":
        if self.console.is_terminal and not self.console.quiet:
            self.bars.start()
        return self

    def say_once(self, line: str, what: str | None = None) -> None:
        """Prints a line that every training of the run would print, or another one that says the same."""
        if (what or line) not in self._said:
            self._said.add(what or line)
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()


class TrainingWatch:
    """The `RunWatch` that shows one training as one bar of a display."""

    def __init__(
        self,
        display: Display,
        stop: "StopSignal",
        title: str,
        epochs: int,
        batches: int,
        line_every: float = _LINE_EVERY,
    ) -> None:
        self._display, self._title, self._epochs, self._batches, self._stop = display, title, epochs, batches, stop
        self._line_every = line_every
        self._task = display.bars.add_task(title, total=epochs * batches or None, state="starting")
        self._here = 0  # iterations of this process
        self._saying = ""
        self._left = epochs * batches
        self._state = "starting"
        self._start = self._last_line = perf_counter()

    def preparing(self, what: str) -> None:
        self._show(what)
        if not self._display.console.is_terminal:
            self._display.say_once(f"{self._title} · {what}", what)

    def begins(self, batches: int) -> None:
        self._batches, self._left = batches, self._epochs * batches
        self._display.bars.update(self._task, total=self._left)
        self._start = self._last_line = perf_counter()

    def resumed(self, epoch: int, iteration: int) -> None:
        done = epoch * self._batches + iteration
        self._left -= done
        self._display.bars.update(self._task, completed=done)
        if self._left:
            self._line(f"goes on from epoch {epoch + 1}, iteration {iteration + 1}")

    def iteration(self, epoch: int, metrics: dict[str, Tensor]) -> None:
        self.advanced(1, epoch, loss_on_host(metrics))

    def advanced(self, count: int, epoch: int, loss: float | None) -> None:
        """`count` iterations are done, the last of which had this cross entropy."""
        self._here, self._left = self._here + count, self._left - count
        shown = "" if loss is None else f" · loss {loss:.3f}"
        self._show(f"epoch {epoch + 1}/{self._epochs}{shown}", advance=count)
        if perf_counter() - self._last_line > self._line_every:
            self._line(f"epoch {epoch + 1}/{self._epochs}{shown}")

    def evaluating(self, part: str) -> None:
        self._show(f"measuring {part} accuracy")

    def epoch(self, row: dict[str, Any]) -> None:
        text = f"epoch {row['epoch'] + 1}/{self._epochs} · loss {row['loss']:.3f}"
        if "val_accuracy" in row:
            text += f" · val {row['val_accuracy']:.1%}"
        self._show(text)
        if row["epoch"] + 1 == self._epochs or perf_counter() - self._last_line > self._line_every:
            self._line(text)

    def say(self, text: str) -> None:
        """What an engine tells, as it comes: a whole line is printed, one not yet whole shows beside the bar."""
        *lines, self._saying = (self._saying + text).split("\n")
        for line in lines:
            self._display.say_once(line)
        self._display.bars.update(self._task, state=self._saying or self._state)

    def done(self, accuracy: float) -> None:
        """The training is over."""
        self._show(f"done · test {accuracy:.1%}")

    def clear(self) -> None:
        """Takes its bar away."""
        self._display.bars.remove_task(self._task)

    def stop_asked(self) -> bool:
        """Whether one of the ranks was asked; all find it at the same time."""
        if current().count == 1:
            return self._stop.asked
        if number := current().most(exit_code() if self._stop.asked else 0):
            note(number - 128)
        return number > 0

    def _show(self, state: str, advance: int = 0) -> None:
        self._state = state
        self._display.bars.update(self._task, advance=advance, state=state)

    def _line(self, text: str) -> None:
        if self._display.console.is_terminal:
            return
        now = perf_counter()
        speed = self._here / (now - self._start)
        eta = self._left / speed if speed else 0.0
        self._display.console.print(
            f"{self._title} · {text} · {speed:.2f} it/s · ETA {eta:.0f} s",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        self._last_line = now


def loss_on_host(metrics: dict[str, Tensor]) -> float | None:
    """The cross entropy; None on a GPU, where showing it would make the queue wait at every iteration."""
    return metrics["loss"].item() if metrics["loss"].device.type == "cpu" else None


def be_silent() -> None:
    """Sends what is printed from here on to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


class StopSignal:
    """Set by the first Ctrl-C, SIGTERM or SIGHUP, for the training to save and stop; the second stops at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, console: Console) -> Iterator["StopSignal"]:
        process = os.getpid()

        def on_signal(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a worker that reads images, which the main process will end
                return
            if self.asked:
                if launched():  # who sends it to all processes sends it to torchrun, which sends it on
                    return
                raise KeyboardInterrupt
            self.asked = True
            note(number)
            try:
                console.print("stopping: the iteration under way is finished and saved (Ctrl-C again stops at once)")
            except (OSError, Interrupted):  # the terminal is gone: nobody reads what is printed from here on
                be_silent()

        if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
            yield self
            return
        # Under nohup the end of the terminal is not the end; Ctrl-C counts also where a shell's `&` took it away.
        hangup = getattr(signal, "SIGHUP", None)
        heard = {number for number in STOPS if number != hangup or signal.getsignal(number) != signal.SIG_IGN}
        old = {number: signal.signal(number, on_signal) for number in heard}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
