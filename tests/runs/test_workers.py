"""Processes that work off tasks: one that dies, and a user who stops."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from l2t_fast.errors import Interrupted, MachineError
from l2t_fast.runs import workers
from l2t_fast.runs.progress import Display, StopSignal


class Dies:
    """A task whose process is killed, as by a lack of memory."""

    title = "doomed"
    folder: Path

    def __init__(self, folder: Path) -> None:
        self.folder = self.config_file = folder
        folder.mkdir(exist_ok=True)

    def run(self, make_watch: Any) -> str:
        with (self.folder / "tries").open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
        return "never"


class Counts(Dies):
    title = "counted"

    def run(self, make_watch: Any) -> str:
        with (self.folder / "runs").open("a") as file:
            file.write(f"{torch.get_num_threads()}\n")
        watch = make_watch("counted", 1, 2)
        for _ in range(2):
            watch.iteration(0, {"loss": torch.zeros(())})
            if watch.stop_asked():
                raise Interrupted
        return "fine"


class Large(Dies):
    """Fits in memory at the second try."""

    title = "large"

    def run(self, make_watch: Any) -> str:
        if not (self.folder / "tries").exists():
            (self.folder / "tries").touch()
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return "fine"


class Hindered(Dies):
    title = "hindered"

    def run(self, make_watch: Any) -> str:
        raise MachineError("the disk is full: make room.")


def test_a_machine_in_the_way(tmp_path: Path) -> None:
    """Too little memory is no error at the second try; a full disk is there for all tasks, and ends them."""
    console = Console(file=(tmp_path / "out").open("w"))
    with Display(console) as display:
        assert workers.work_off([Large(tmp_path / "a")], 2, 1, display, StopSignal()) == []
        with pytest.raises(MachineError, match=r"^hindered: the disk is full: make room\.$"):
            workers.work_off([Hindered(tmp_path / "b"), Counts(tmp_path / "c")], 1, 1, display, StopSignal())
    console.file.flush()
    said = (tmp_path / "out").read_text()
    assert "large: memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB): give --memory recompute" in said
    assert "is tried once more, with 1 side by side" in said
    assert not (tmp_path / "c/runs").exists()


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    tasks = [Dies(tmp_path / "a"), Counts(tmp_path / "b"), Counts(tmp_path / "c")]
    console = Console(file=(tmp_path / "out").open("w"))
    with Display(console) as display:
        failed = workers.work_off(tasks, 1, 1, display, StopSignal())
    assert [task for task, _ in failed] == [tasks[0]]
    assert failed[0][1].startswith(
        "its process was killed, which the system usually does when memory runs out: give fe"
    )
    assert (tmp_path / "a/tries").read_text() == "xx"  # once more, and not for ever
    console.file.flush()
    assert "is tried once more, with 1 side by side" in (tmp_path / "out").read_text()
    assert [(tmp_path / name / "runs").read_text() for name in "bc"] == ["1\n", "1\n"]


def test_stopping_leaves_the_rest_undone(tmp_path: Path) -> None:
    stop = StopSignal()
    stop.asked = True
    with Display(Console(file=(tmp_path / "out").open("w"))) as display, pytest.raises(Interrupted):
        workers.work_off([Counts(tmp_path / "a")], 1, 1, display, stop)
    assert not list((tmp_path / "a").iterdir())
