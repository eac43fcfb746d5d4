"""A run that is killed at any of its file operations goes on to the bit."""

import subprocess
import sys
from pathlib import Path

import pytest

from l2t_fast.training.log import read_metrics
from tests.runs.commands import SMALL

pytestmark = pytest.mark.slow

# Counts what a run does to files in its folder and kills its process at the one asked for; writes the count at the end.
KILLER = """
import os, signal, sys
folder, at, counted = sys.argv[1], int(sys.argv[2]), 0
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.link", "os.truncate", "os.rmdir", "shutil.move"}

def hook(event, arguments):
    global counted
    writes = event == "open" and (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) != 0
    paths = [str(a) for a in arguments if isinstance(a, (str, os.PathLike))]
    if (writes or event in CHANGES) and any(path.startswith(folder) for path in paths):
        counted += 1
        if counted == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
sys.argv = ["l2t-fast", *sys.argv[3:]]
from l2t_fast.cli import main
try:
    main(sys.argv[1:])
finally:
    print(counted)
"""


def command(folder: Path, at: int, *more: str) -> list[str]:
    given = ["train", "--runs", str(folder), "--name", "run", *more]
    return [sys.executable, "-c", KILLER, str(folder), str(at), *given]


NEW = [*SMALL[:-4], "--method", "at", "--seeds", "0", "--epochs", "2"]


def test_killed_at_file_operations(tmp_path: Path) -> None:
    """Every third of them, from the first to the last."""
    whole = tmp_path / "whole"
    done = subprocess.run(command(whole, 0, *NEW), capture_output=True, text=True, check=True)
    operations = int(done.stdout.split()[-1])
    assert operations > 20
    wanted = {path.relative_to(whole): read_metrics(path) for path in whole.glob("**/metrics.jsonl")}
    assert wanted
    for at in range(1, operations + 1, 3):
        folder = tmp_path / f"killed-{at}"
        killed = subprocess.run(command(folder, at, *NEW), capture_output=True, text=True, check=False)
        assert killed.returncode < 0, f"operation {at} was not reached"
        begun = (folder / "run/config.json").exists()
        more = ["--resume"] if begun else NEW
        subprocess.run(command(folder, 0, *more), capture_output=True, text=True, check=True)
        for path, metrics in wanted.items():
            assert read_metrics(folder / path) == metrics, f"killed at operation {at}"
        assert not list(folder.glob("**/*.part")), f"killed at operation {at}"
