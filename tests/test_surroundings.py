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
            {"PYTHONIOENCODING": "latin-1", "HOME": NOWHERE, "MPLCONFIGDIR": NOWHERE, "NO_COLOR": "1", "TERM": None}
            | {"MPLBACKEND": "none such", "COLUMNS": "0"},
            "latin-1",
            "·",
        ),
    ],
    ids=["ascii, no home, dumb, -O", "latin-1, read-only home, no colour, no backend, no columns"],
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
    _, error = process.communicate(timeout=300)
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
    _, error = process.communicate(timeout=300)
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
    assert process.wait(timeout=300) == 130
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


def started_in(arguments: list[str], cwd: Path, before: str) -> subprocess.CompletedProcess[str]:
    """A command in a shell in which this was done before."""
    command = f'{before}; exec "$0" "$@"'
    return subprocess.run(
        ["sh", "-c", command, *COMMAND, *arguments],
        cwd=cwd,
        env=surroundings(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_closed_is_written_nowhere(tmp_path: Path) -> None:
    """Nor into a file that is opened in its place."""
    done = started_in(["train", "--help"], tmp_path, "exec >&-")
    assert (done.returncode, done.stderr) == (0, "")
    done = started_in(["train", "--name", ".."], tmp_path, "exec <&- >&- 2>&-")
    assert done.returncode == 2
    script = "from l2t_fast.cli import main; main(['--version']); import os; os._exit(os.open('/', os.O_RDONLY))"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script], env=surroundings(), check=False
    )
    assert done.returncode > 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_error_that_nobody_can_read_has_its_exit_code(tmp_path: Path) -> None:
    assert started_in(["train", "--name", ".."], tmp_path, "exec 2>/dev/full").returncode == 2


def test_a_working_folder_that_was_removed(tmp_path: Path) -> None:
    """In which libraries of numbers end the process."""
    (tmp_path / "here").mkdir()
    done = started_in(["doctor"], tmp_path / "here", "rmdir ../here")
    assert done.returncode == 3
    assert done.stderr.startswith(
        "l2t-fast: the working folder cannot be had (No such file or directory): change to an"
    )


def test_stopped_before_anything_is_loaded(tmp_path: Path) -> None:
    """Loading the command line takes a moment, too."""
    (tmp_path / "tyro.py").write_text("raise KeyboardInterrupt")
    here = surroundings()
    path = os.pathsep.join([str(tmp_path), here["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "l2t_fast", "doctor"],
        env={**here, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As where memory is too little for PyTorch itself."""

    def fail(*arguments: object) -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    monkeypatch.setattr("l2t_fast.cli.tyro.extras.subcommand_cli_from_dict", lambda *given, **more: fail())
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 3
    error = capsys.readouterr().err
    assert error.startswith("l2t-fast: a library cannot be loaded (libtorch_cpu.so: failed to map segment from shared")


def test_what_names_would_have_a_terminal_do_is_spelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "x\x1b[2J\x07é")])
    error = capsys.readouterr().err
    assert r"x\x1b[2J\x07é is no run" in error
    assert "\x1b" not in error
