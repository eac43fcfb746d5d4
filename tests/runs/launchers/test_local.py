"""Processes of this machine."""

from pathlib import Path

from rich.console import Console

from l2t_fast.runs import workers
from l2t_fast.runs.launchers.local import Local
from l2t_fast.runs.progress import Display, StopSignal
from tests.runs.launchers.shared import Breaks, Counts, Waits


def test_processes_are_divided_among_the_gpus(tmp_path: Path) -> None:
    """Each sees its own alone; one whose task broke is replaced by one on the same."""
    broken, second, replaced = (tmp_path / name for name in "abc")
    tasks = [Breaks(broken), Waits(second, replaced), Counts(replaced)]
    with Display(Console(quiet=True)) as display:
        failed = workers.work_off(tasks, 2, 1, display, StopSignal(), Local(["5", "GPU-7"]))
    assert [(task, why) for task, why in failed] == [(tasks[0], f"ZeroDivisionError, see {tmp_path / 'a/error.txt'}")]
    assert "ZeroDivisionError" in (tmp_path / "a/error.txt").read_text()
    assert [(folder / "runs").read_text() for folder in (second, replaced)] == ["1 GPU-7\n", "1 5\n"]
