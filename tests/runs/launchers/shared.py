"""Tasks that are no trainings, for the tests of launchers."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from l2t_fast.errors import Interrupted


class Counts:
    """Notes where it runs, and tells of two iterations."""

    title = "counted"

    def __init__(self, folder: Path) -> None:
        self.folder = self.config_file = folder
        folder.mkdir(exist_ok=True)

    def run(self, make_watch: Any) -> str:
        with (self.folder / "runs").open("a") as file:
            file.write(f"{torch.get_num_threads()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        watch = make_watch(self.title, 1, 2)
        for _ in range(2):
            watch.iteration(0, {"loss": torch.zeros(())})
            if watch.stop_asked():
                raise Interrupted
        watch.epoch({"epoch": 0, "loss": 0.25})
        return "fine"


class Waits(Counts):
    """Is not done before a task in the folder beside it has begun."""

    def __init__(self, folder: Path, other: Path) -> None:
        super().__init__(folder)
        self.other = other

    def run(self, make_watch: Any) -> str:
        until = time.monotonic() + 300
        while not (self.other / "runs").exists() and time.monotonic() < until:
            time.sleep(0.05)
        return super().run(make_watch)


class DiesOnce(Counts):
    """Its process is killed, as with the machine it runs on, the first time."""

    title = "lost"

    def run(self, make_watch: Any) -> str:
        if not (self.folder / "runs").exists():
            (self.folder / "runs").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(make_watch)


class Breaks(Counts):
    title = "broken"

    def run(self, make_watch: Any) -> str:
        raise ZeroDivisionError
