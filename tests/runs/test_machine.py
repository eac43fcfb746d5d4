"""What a run does where the machine is in its way, and with files that something else has damaged."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from l2t_fast.cli import main
from tests.runs.commands import SMALL, refused

QUICK = [*SMALL[:-4], "--method", "l2t-ww", "--seeds", "0", "--epochs", "1", "--source-epochs", "1"]
# The command line under a limit on the size of files, which is how a disk fills up in a test.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
from l2t_fast.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run in it."""
    folder = tmp_path_factory.mktemp("runs")
    main(["train", "--runs", str(folder), "--name", "run", *QUICK])
    return folder


def failed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command says that ends with the exit code of a machine in its way."""
    with pytest.raises(SystemExit) as stopped:
        main(list(command))
    assert stopped.value.code == 3
    return " ".join(capsys.readouterr().err.split())


def test_a_full_disk_ends_a_run_that_goes_on_later(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    command = ["train", "--runs", str(tmp_path), "--name", "run", *QUICK]
    done = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith(f"l2t-fast: {tmp_path / 'run/source'}")
    assert "bytes needed, room for" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.part"))
    main(["train", "--runs", str(tmp_path), "--name", "run", "--resume"])
    assert (tmp_path / "run/table.md").exists()


@pytest.mark.parametrize("command", ["train", "table", "pretrain", "inspect"])
def test_a_folder_that_may_not_be_written(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    given = {
        "train": ["--resume", "--runs", str(runs), "--name", "run"],
        "table": ["--runs", str(runs), "--name", "grid", *SMALL, "--method", "scratch"],
        "pretrain": ["--runs", str(runs), "--name", "source", "--network", "resnet8", "--width", "0.25"],
        "inspect": [str(runs / "run")],
    }
    monkeypatch.setattr(Path, "mkdir", fail)
    monkeypatch.setattr(os, "replace", fail)
    error = failed(capsys, command, *given[command])
    assert f"cannot be written ({os.strerror(errno.EROFS)}): allow writing there, or give another folder" in error


def test_damaged_files_of_a_run_are_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = runs / "run/l2t-ww/seed-0"
    for path, content, words in (
        (cell / "result.json", "", "result.json is damaged"),
        (cell / "result.json", "{}", "result.json is damaged ('test_accuracy_last' is no number)"),
        (cell / "metrics.jsonl", "{}\n", "metrics.jsonl, line 1, is damaged"),
        (runs / "run/config.json", "{}", "config.json: --epochs None is too small"),
    ):
        before = path.read_bytes()
        path.write_text(content)
        error = refused(capsys, "--runs", str(runs), "--name", "run", "--resume", command="train")
        path.write_bytes(before)
        assert f"{path.parent}/{words}" in error


@pytest.mark.parametrize("name", ["problems.json", "inputs.json"])
def test_damaged_files_of_a_table_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    column = tmp_path / "grid/digits-vgg9_bn-10"
    column.mkdir(parents=True)
    (column / name).write_text("")
    given = ["--runs", str(tmp_path), "--name", "grid", *SMALL, "--method", "scratch", "--seeds", "0"]
    (tmp_path / "grid/table.json").write_text('{"threads": 1}')
    assert f"{column / name} is damaged" in refused(capsys, *given)
