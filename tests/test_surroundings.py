"""Signals, pipes, terminals, homes and encodings: a command ends as it should wherever it runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2t_fast.cli import main
from l2t_fast.files import load_checkpoint
from tests.data.samples import write_folder

COMMAND = [sys.executable, "-m", "l2t_fast.cli"]
QUICK = ["--target-width", "0.0625", "--seeds", "0", "--name", "[red]x", "--epochs"]
NOWHERE = "/proc/nowhere"  # where nobody can write, root included


def surroundings(**changes: str | None) -> dict[str, str]:
    """This process's own, with these changes; None takes away."""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in {**here, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("python", "changes", "encoding", "dot"),
    [
        (
            ["-O"],
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": None, "TERM": "dumb"},
            "ascii",
            "-",
        ),
        (
            [],
            {"PYTHONIOENCODING": "latin-1", "HOME": NOWHERE, "MPLCONFIGDIR": NOWHERE, "NO_COLOR": "1", "TERM": None},
            "latin-1",
            "·",
        ),
    ],
    ids=["ascii, no home, dumb, -O", "latin-1, read-only home, no colour"],
)
def test_a_run_and_what_it_learned(
    tmp_path: Path, python: list[str], changes: dict[str, str | None], encoding: str, dot: str
) -> None:
    """In another working folder, under a name that looks like markup."""
    interpreter = [sys.executable, *python, "-m", "l2t_fast.cli"]
    small = ["--source-width", "0.25", "--source-epochs", "1", "--method", "l2t-ww", "--runs", "[bold]", *QUICK, "1"]
    for arguments in (["train", *small], ["inspect", "[bold]/[red]x"]):
        done = subprocess.run(
            [*interpreter, *arguments], cwd=tmp_path, env=surroundings(**changes), capture_output=True, check=False
        )
        told = done.stdout.decode(encoding)
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
        assert "[bold]/[red]x" in told
        assert "\x1b" not in told
        if arguments[0] == "train":
            assert "resnet8 -> vgg9_bn" in told
            assert f"seed 0 {dot} epoch 1/1 {dot} loss" in told
        else:
            assert "lambda" in told
    assert "±" in (tmp_path / "[bold]/[red]x/table.md").read_text(encoding="utf-8")


def heard() -> None:
    """Whoever runs the tests may ignore SIGHUP (nohup), which a process has from its parent."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def started(tmp_path: Path, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    """A training that goes on for long and has saved once, in a group of its own; and its checkpoint."""
    command = [*COMMAND, "train", "--runs", str(tmp_path), "--method", "scratch", *QUICK, "100000", *arguments]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings(),
        preexec_fn=heard,
    )
    last = tmp_path / "[red]x/scratch/seed-0/last.pt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process, last


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_a_group_with_image_workers_saves(tmp_path: Path, number: int) -> None:
    write_folder(tmp_path / "images")
    given = f"--dataset folder --data-root {tmp_path / 'images'} --target resnet8 --batch-size 4 --workers 2"
    process, last = started(tmp_path, *given.split())
    before = last.stat().st_mtime_ns
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "stopped and saved" in error
    assert "Traceback" not in error
    assert last.stat().st_mtime_ns > before


def test_interrupted_twice(tmp_path: Path) -> None:
    """At once, and what was saved is whole."""
    process, last = started(tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.002)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert load_checkpoint(last)["state"]["epoch"] > 0
    assert not list(last.parent.glob("*.part"))


def test_who_reads_leaves(tmp_path: Path) -> None:
    """As `| head` does: the training saves and stops, and says nothing."""
    process, last = started(tmp_path)
    before = last.stat().st_mtime_ns
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert (
        error.replace("l2t_fast: mode 'eager', since on a cpu compiling takes minutes and brings nothing\n", "") == ""
    )
    assert last.stat().st_mtime_ns > before


def test_help_into_a_pipe_that_is_closed() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "train", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 130)


def test_names_in_brackets_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--runs", str(tmp_path / "[/x]"), "--name", "[red]x", "--resume"])
    assert stopped.value.code == 2
    assert "[/x]/[red]x" in capsys.readouterr().err.replace("\n", "")
