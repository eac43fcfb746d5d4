"""What a run does where the machine is in its way, and with files that something else has damaged."""

import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from l2t_fast.cli import main
from l2t_fast.data.readers.layout import open_image
from l2t_fast.errors import L2TError
from l2t_fast.files import load_checkpoint
from l2t_fast.reports.column import read_problems
from l2t_fast.training.log import read_metrics
from tests.data.samples import write_folder
from tests.runs.commands import SMALL, refused

QUICK = [*SMALL[:-4], "--method", "l2t-ww", "--seeds", "0", "--epochs", "1", "--source-epochs", "1"]


def deadly(path: str) -> Image.Image:
    """An image of which no process survives the reading."""
    if path.endswith("train/b/2.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return open_image(path)


def damaged(path: str) -> Image.Image:
    if path.endswith("train/b/2.png"):
        raise L2TError(f"{path} is no readable image; replace or remove it.")
    return open_image(path)


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


def test_a_full_disk_ends_a_run_that_goes_on_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files is how a disk fills up in a test."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        error = failed(capsys, "train", "--runs", str(tmp_path), "--name", "run", *QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.startswith(f"l2t-fast: {tmp_path / 'run/source'}")
    assert "bytes needed, room for" in error
    assert not list(tmp_path.rglob("*.part"))
    main(["train", "--runs", str(tmp_path), "--name", "run", "--resume"])
    assert (tmp_path / "run/table.md").exists()


def test_readers_that_are_killed_again_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned until then is saved, and goes on to the bit; the same with an image that has become damaged."""
    write_folder(tmp_path / "images", count=6)
    given = f"--dataset folder --data-root {tmp_path / 'images'} --target resnet8 --target-width 0.25 --seeds 0"
    given += f" --method scratch --batch-size 2 --epochs 2 --runs {tmp_path}"
    main(["train", "--name", "whole", *given.split(), "--workers", "0"])
    rows = [read_metrics(tmp_path / name / "scratch/seed-0/metrics.jsonl") for name in ["whole"]]
    monkeypatch.setattr("l2t_fast.data.images.open_image", deadly)
    error = failed(capsys, "train", "--name", "run", *given.split(), "--workers", "1")
    assert "processes that read images end again and again" in error
    assert error.endswith("which the system usually does to them when memory runs out: give fewer --workers.")
    cell = tmp_path / "run/scratch/seed-0"
    assert load_checkpoint(cell / "last.pt")["state"]["iteration"] > 0
    monkeypatch.setattr("l2t_fast.data.images.open_image", damaged)
    resume = ["train", "--name", "run", "--runs", str(tmp_path), "--resume", "--workers", "0"]
    with pytest.raises(SystemExit) as stopped:
        main(resume)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert "is no readable image" in told.err
    assert f"{cell / 'last.pt'} holds what was learned until an image could not be read" in told.out
    monkeypatch.undo()
    main(resume)
    rows.append(read_metrics(cell / "metrics.jsonl"))
    assert rows[0] == rows[1]


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
    result = json.loads((cell / "result.json").read_text())
    for path, content, words in (
        (cell / "result.json", "", "result.json is damaged"),
        (cell / "result.json", "{}", "result.json is damaged ('test_accuracy_last' is no number)"),
        (cell / "result.json", '{"test_accuracy_last": 1e308, "seconds": 1}', "result.json is damaged ('test_acc"),
        (cell / "result.json", result | {"test_accuracy_best": "a"}, "result.json is damaged ('test_accuracy_best' c"),
        (cell / "result.json", result | {"seconds": math.nan}, "result.json is damaged ('seconds' cannot be nan)"),
        (cell / "result.json", result | {"made": {"--beta": "2"}}, "result.json was made with --beta 2, not 0.5"),
        (cell / "result.json", result | {"seconds": math.inf}, "result.json is damaged ('seconds' cannot be inf)"),
        (cell / "result.json", result | {"made": 3}, "result.json is damaged ('made' cannot be 3)"),
        (cell / "result.json", result | {"made": {"--lr": 5}}, "result.json is damaged ('made' cannot be {'--lr': 5})"),
        (cell / "result.json", result | {"best_epoch": "x"}, "result.json is damaged ('best_epoch' cannot be 'x')"),
        (cell / "result.json", result | {"images": -4}, "result.json is damaged ('images' cannot be -4)"),
        (cell / "result.json", result | {"seconds": True}, "result.json is damaged ('seconds' is no number)"),
        (cell / "result.json", '{"a": 1, "a": 2}', "result.json is damaged ('a' is there twice)"),
        (cell / "metrics.jsonl", "{}\n", "metrics.jsonl, line 1, is damaged"),
        (runs / "run/config.json", "{}", "config.json: --epochs None is too small"),
    ):
        before = path.read_bytes()
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        error = refused(capsys, "--runs", str(runs), "--name", "run", "--resume", command="train")
        path.write_bytes(before)
        assert f"{path.parent}/{words}" in error


@pytest.mark.parametrize("name", ["problems.json", "inputs.json"])
def test_damaged_files_of_a_table_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    column = tmp_path / "grid/digits-vgg9_bn-10"
    column.mkdir(parents=True)
    given = ["--runs", str(tmp_path), "--name", "grid", *SMALL, "--method", "scratch", "--seeds", "0"]
    (tmp_path / "grid/table.json").write_text('{"threads": 1}')
    for content in ("", '{"scratch": {}, "scratch": {}}'):
        (column / name).write_text(content)
        assert f"{column / name} is damaged" in refused(capsys, *given)


def test_problems_that_are_no_words_are_refused(tmp_path: Path) -> None:
    for content in ('{"scratch": {"0": 5}}', '{"scratch": {"0": null}}', '{"scratch": 3}'):
        (tmp_path / "problems.json").write_text(content)
        with pytest.raises(L2TError, match=r"problems.json is damaged: remove it"):
            read_problems(tmp_path)
