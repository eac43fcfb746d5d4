"""What can happen to a run while it works."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from l2t_fast.cli import main
from l2t_fast.runs import cell
from tests.runs.commands import SMALL, refused, rows

QUICK = [*SMALL[:-4], "--epochs", "1", "--seeds", "0"]


@pytest.mark.parametrize("what", ["run", "run/scratch/seed-0"])
def test_a_folder_that_is_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    def fit(*arguments: Any) -> Any:
        result = whole(*arguments)
        shutil.rmtree(tmp_path / what)
        return result

    whole = cell.fit
    monkeypatch.setattr(cell, "fit", fit)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--runs", str(tmp_path), "--name", "run", *QUICK, "--method", "scratch"])
    assert stopped.value.code == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "scratch/seed-0/result.json cannot be written, as its folder was removed meanwhile: what was in it" in error
    assert not (tmp_path / what).exists()


def test_a_folder_that_is_removed_between_two_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_cell(*arguments: Any) -> Any:
        result = whole(*arguments)
        (tmp_path / "run/config.json").unlink()
        return result

    whole = cell.train_cell
    monkeypatch.setattr("l2t_fast.runs.tasks.train_cell", train_cell)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--runs", str(tmp_path), "--name", "run", *QUICK, "--method", "scratch", "lwf"])
    assert stopped.value.code == 3
    assert "run was removed meanwhile: what was in it is lost; start anew" in " ".join(capsys.readouterr().err.split())


def test_a_training_that_diverges_does_not_end_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--runs", str(tmp_path), "--name", "run", *QUICK, "--method", "fm-single", "scratch"]
    error = refused(capsys, *given, "--settings", "fm-single.beta=1e39", command="train")
    assert error.startswith("fm-single, seed 0: ")
    assert error.endswith("lower the learning rate or beta in a run of another --name.")
    found = {row["method"]: row["seeds"] for row in rows(tmp_path / "run")}
    assert found == {"fm-single": "0", "scratch": "1"}
    assert "in a run of another --name" in (tmp_path / "run/table.md").read_text()
    capsys.readouterr()
    # The advice can be followed, and the run that goes on trains again what failed, alone.
    done = tmp_path / "run/scratch/seed-0/last.pt"
    before = done.stat().st_mtime_ns
    assert "fm-single, seed 0" in refused(capsys, *given[:4], "--resume", command="train")
    assert done.stat().st_mtime_ns == before
    main(["train", "--runs", str(tmp_path), "--name", "again", *QUICK, "--method", "fm-single", "--lr", "0.01"])


# Works off one task, which notes its process and never looks up.
STUCK = """
import os, sys, time
from pathlib import Path
from rich.console import Console
from l2t_fast.runs import workers
from l2t_fast.runs.progress import Display, StopSignal

class Stuck:
    title = "stuck"
    folder = config_file = Path(sys.argv[1])
    def run(self, make_watch):
        (self.folder / "part").write_text(str(os.getpid()))
        (self.folder / "part").rename(self.folder / "pid")
        time.sleep(600)

if __name__ == "__main__":
    with Display(Console()) as display:
        workers.work_off([Stuck()], 1, 1, display, StopSignal())
"""


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended; one that nobody has asked about has."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    path = os.pathsep.join(p for p in sys.path if p)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "stuck.py", tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    worker = int((tmp_path / "pid").read_text())
    assert runs(worker)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(worker)
