"""One process at a time in a folder, names that stay in RUNS, and folders where nothing was begun."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2t_fast.cli import main
from l2t_fast.errors import Interrupted, L2TError
from l2t_fast.files import save_text
from l2t_fast.runs.lock import LOCK, alone, begun, check_free
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import TrainConfig
from l2t_fast.settings.stored import save_config
from tests.runs.commands import SMALL, arguments, refused

fcntl = pytest.importorskip("fcntl")

# Holds a folder until it is killed; with a child that has the lock from it, and ends a little later.
HOLD = """
import os, sys, time
from pathlib import Path
from l2t_fast.runs.lock import alone
with alone(Path(sys.argv[1])):
    if sys.argv[2:] and not os.fork():
        time.sleep(3)
        os._exit(0)
    print("held", flush=True)
    time.sleep(600)
"""
QUICK = [*SMALL[:-4], "--method", "scratch", "--seeds", "0", "--epochs", "1"]


def holder(folder: Path, *more: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever command it is."""
    (tmp_path / "run").mkdir()
    save_config(resolve(TrainConfig(name="run")), tmp_path / "run/config.json")
    process = holder(tmp_path / "run")
    try:
        who = f"process {process.pid} on {socket.gethostname()}, since 2"
        with pytest.raises(L2TError, match=who), alone(tmp_path / "run"):
            pass
        with pytest.raises(Interrupted), alone(tmp_path / "run", lambda: True):
            pass
        for command, *more in (["train", *SMALL[:-4]], ["train", "--resume"], ["pretrain"], ["table", *SMALL]):
            error = refused(capsys, "--runs", str(tmp_path), "--name", "run", *more, command=command)
            assert error.startswith(who)
            assert error.endswith(f"works in {tmp_path / 'run'}: wait for it, or give another --name.")
        assert who in refused(capsys, "--runs", str(tmp_path), "--resume", command="train")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("place", ["digits-vgg9_bn-10", "sources/digits"])
def test_a_table_is_alone_in_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    """A `train` in one of them keeps the table out, and the table would keep the `train` out by the same lock."""
    process = holder(tmp_path / "grid" / place)
    try:
        error = refused(capsys, *arguments(tmp_path, "grid", "--method", "scratch", "fm-single", "--seeds", "0")[1:])
        assert f"process {process.pid} on" in error
        assert f"works in {tmp_path / 'grid' / place}" in error
    finally:
        process.kill()
        process.wait()
    assert not begun(tmp_path / "grid")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    process = holder(tmp_path, "with a child")
    process.kill()
    process.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    with alone(tmp_path):  # once the child has ended, too
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(L2TError, match=f"process {os.getpid()} on"):
            check_free(tmp_path)
    check_free(tmp_path)


@pytest.mark.slow  # it starts four processes
def test_two_at_once_are_one_run(tmp_path: Path) -> None:
    """Two `train --name N`, then two `--resume` after a kill: one trains, the other leaves, no row is there twice."""
    command = [sys.executable, "-m", "l2t_fast.cli", "train", "--runs", str(tmp_path), "--name", "run"]
    new = [*SMALL[:-4], "--method", "scratch", "--seeds", "0", "--epochs", "300"]
    rows = tmp_path / "run/scratch/seed-0/metrics.jsonl"

    def both(*more: str) -> tuple[subprocess.Popen[str], str]:
        """The one that goes on, and what the other said."""
        pair = [subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True) for _ in range(2)]
        deadline = time.monotonic() + 120
        while all(process.poll() is None for process in pair) and time.monotonic() < deadline:
            time.sleep(0.02)
        second, first = sorted(pair, key=lambda process: process.poll() is None)
        _, error = second.communicate(timeout=300)
        assert second.returncode == 2, error
        assert f"process {first.pid} on" in error
        return first, error

    first, _ = both(*new)
    before = rows.stat().st_size if rows.exists() else 0
    deadline = time.monotonic() + 60
    while (rows.stat().st_size if rows.exists() else 0) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    first, _ = both("--resume")
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=300)
    assert first.returncode == 130, error
    found = [(row["epoch"], row.get("iteration")) for row in map(json.loads, rows.read_text().splitlines())]
    assert len(set(found)) == len(found)


def test_where_nothing_was_begun_a_run_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command killed before config.json was there."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (LOCK, "config.json.part"):
        (folder / name).touch()
    error = refused(capsys, "--runs", str(tmp_path), "--name", "run", "--resume", command="train")
    assert error == f"nothing was begun in {folder}: start it without --resume."
    main(["train", "--runs", str(tmp_path), "--name", "run", *QUICK])
    assert (folder / "table.md").exists()
    error = refused(capsys, "--runs", str(tmp_path), "--name", "run", *QUICK, command="train")
    assert "exists already: give another --name, or go on with it by --resume" in error
    (tmp_path / "file").touch()
    error = refused(capsys, "--runs", str(tmp_path), "--name", "file", *QUICK, command="train")
    assert "is a file, not the folder of a run" in error


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../a", "/tmp/a", "a\\b", "C:a", "a\n", "a\0", "a" * 300])
def test_a_name_stays_in_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    runs = tmp_path / "runs"
    (runs / "old").mkdir(parents=True)
    save_config(TrainConfig(name=name), runs / "old/config.json")
    save_config(TrainConfig(name=name), runs / "old/table.json")
    commands = (["train"], ["train", "--resume"], ["pretrain"], ["pretrain", "--resume"], ["table"])
    for command, *more in commands:
        error = refused(capsys, "--runs", str(runs), f"--name={name}", *more, command=command)
        assert "is not the name of a folder: give letters, digits, dashes and dots" in error
    assert "is not the name of a folder" in refused(capsys, "--runs", str(runs), "--resume", command="train")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in runs.iterdir()] == ["old"]


def test_what_a_link_leads_to_is_not_overwritten(tmp_path: Path) -> None:
    """Neither by the lock nor by what a killed process left half written."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to("../precious")
    with pytest.raises(L2TError, match=r"run/.lock is not the lock of a run, but a link"), alone(tmp_path / "run"):
        pass
    (tmp_path / "run/x.part").symlink_to("../precious")
    save_text(tmp_path / "run/x", "ours")
    assert (tmp_path / "run/x").read_text() == "ours"
    assert not (tmp_path / "run/x").is_symlink()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("thing", ["folder", "pipe"])
def test_a_lock_that_is_no_file(tmp_path: Path, thing: str) -> None:
    (os.mkfifo if thing == "pipe" else os.mkdir)(tmp_path / ".lock")
    with pytest.raises(L2TError, match=r".lock is not the lock of a run"), alone(tmp_path):
        pass


@pytest.mark.parametrize("pid", [10**40, -1, True, "1"])
def test_locks_with_other_words_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: object) -> None:
    monkeypatch.setattr("l2t_fast.runs.lock._ENDING", 0.1)
    for words in (json.dumps({"pid": pid, "host": socket.gethostname()}), "[" * 100_000, "\xff", "[]"):
        (tmp_path / ".lock").write_bytes(words.encode("latin-1"))
        with (tmp_path / ".lock").open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(L2TError, match=r"works in .*: wait for it"), alone(tmp_path):
                pass
