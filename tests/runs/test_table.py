"""`l2t-fast table`: cells, columns, interruptions."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2t_fast.cli import main
from l2t_fast.files import load_checkpoint
from l2t_fast.training.log import read_metrics
from tests.runs.commands import SMALL, arguments, refused, rows, table

METHODS = ["lwf+at", "l2t-ww"]


def test_a_table_killed_at_random_points_is_the_same_table(tmp_path: Path) -> None:
    """SIGKILL, which nothing can catch, and Ctrl-C; then the same command again, until it ends by itself."""
    given = ["--epochs", "3", "--seeds", "0", "1", "--jobs", "2", "--threads", "1", "--method", *METHODS]
    command = [sys.executable, "-m", "l2t_fast.cli", *arguments(tmp_path, "killed", *given)]
    folder = tmp_path / "killed"
    draw = random.Random(7)
    done: dict[Path, int] = {}
    kills, process = 0, subprocess.Popen(command, start_new_session=True)
    while True:
        looked = time.monotonic()
        # Once there is something new: another checkpoint or another cell, and then a random time later.
        before = {path: path.stat().st_mtime_ns for path in folder.glob("**/*.pt")}
        while process.poll() is None and time.monotonic() < looked + 120:
            if {path: path.stat().st_mtime_ns for path in folder.glob("**/*.pt")} != before:
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.5))
        if kills == 3 or process.poll() is not None:
            break
        kills += 1
        if kills % 2:
            process.kill()  # its workers find out by themselves
        else:
            os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=300)
        done |= {path: path.stat().st_mtime_ns for path in folder.glob("**/result.json")}
        process = subprocess.Popen(command, start_new_session=True)
    assert process.wait(timeout=300) == 0
    assert kills == 3
    assert done, "no cell was finished before a kill: the test shows less than it should"

    whole = table(tmp_path, "whole", *given)
    assert rows(folder) == rows(whole)
    assert rows(folder, "cells.csv") == rows(whole, "cells.csv")
    assert len(rows(whole, "cells.csv")) == 4
    for path in whole.glob("**/metrics.jsonl"):
        assert read_metrics(folder / path.relative_to(whole)) == read_metrics(path)
    (session,) = map(json.loads, (whole / "sessions.jsonl").read_text().splitlines())
    assert {key: session[key] for key in ("cells", "jobs", "threads")} == {"cells": 4, "jobs": 2, "threads": 1}
    for path, when in done.items():
        assert path.stat().st_mtime_ns == when  # what was done was not done again


def test_columns_sweeps_and_growing(tmp_path: Path, capsys: pytest.CaptureFixture[str], inline: None) -> None:
    """Two targets and two sizes; then more methods and seeds by the same command."""
    given = ["--target", "vgg9_bn", "resnet8", "--target-width", "0.0625", "0.25", "--epochs", "2"]
    small = [word for word in SMALL if word not in ("--target-width", "0.0625")]
    command = ["table", "--runs", str(tmp_path), "--name", "grid", *small, *given, "--per-class", "2,4"]
    main([*command, "--method", "scratch", "finetune", "--seeds", "0"])
    folder = tmp_path / "grid"
    names = {f"digits-{target}-{size}" for target in ("vgg9_bn", "resnet8") for size in (2, 4)}
    assert {path.parent.name for path in folder.glob("*/config.json")} == names
    found = {(row["column"], row["method"]): row for row in rows(folder)}
    assert len(found) == 8
    assert found["digits, resnet8, 4 per class", "finetune"]["seeds"] == "1"
    assert found["digits, vgg9_bn, 4 per class", "finetune"]["seeds"] == "0"
    assert "nothing of the source (CifarResNet) fits the target (CifarVGG)" in (folder / "table.md").read_text()
    assert {row["per_class"] for row in found.values()} == {"2", "4"}
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("sources/*/source/source.pt"))) == 1  # shared by the columns
    # The fine-tuned network starts where the source ended.
    start = read_metrics(folder / "digits-resnet8-4/finetune/seed-0/metrics.jsonl")[0]["loss"]
    assert start != read_metrics(folder / "digits-resnet8-4/scratch/seed-0/metrics.jsonl")[0]["loss"]

    before = {path: path.stat().st_mtime_ns for path in folder.glob("**/result.json")}
    main([*command, "--method", "scratch", "finetune", "fm-single", "--seeds", "0", "1"])
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    found = {(row["column"], row["method"]): row for row in rows(folder)}
    assert found["digits, resnet8, 2 per class", "fm-single"]["seeds"] == "2"
    # A narrower command tells of all that is there; another source for one more column is refused.
    narrow = ["table", "--runs", str(tmp_path), "--name", "grid", *small, "--target", "resnet8", "--epochs", "2"]
    narrow += ["--target-width", "0.25", "--per-class", "2", "--method", "scratch", "--seeds", "0"]
    main(narrow)
    assert {(row["column"], row["method"]): row for row in rows(folder)} == found
    other = [word if word != "1" or narrow[i - 1] != "--source-epochs" else "3" for i, word in enumerate(narrow)]
    other[other.index("resnet8", 8)] = "resnet14"
    assert "the source of digits was made with --source-epochs 1, not 3" in refused(capsys, *other[1:])
    error = refused(capsys, *command[1:], "--lr", "0.5")
    assert "was made with --lr 0.03, not 0.5: give the same settings again, or another --name" in error


def test_two_sources_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str], inline: None) -> None:
    """Two of different architecture, for every kind of method; what was learned of both."""
    folder = table(
        tmp_path, "two", "--source", "resnet8", "resnet14", "--epochs", "2", "--seeds", "0", "--method", "lwf+at",
        "jacobian", "fm-one-to-one", "l2t-w-single", "l2t-ww",
    )  # fmt: skip
    assert {path.parent.name for path in folder.glob("sources/digits/*/source.pt")} == {"source-1", "source-2"}
    first, second = (load_checkpoint(folder / f"sources/digits/source-{i}/last.pt")["engine"]["theta"] for i in (1, 2))
    assert len(second) > len(first)
    cell = folder / "digits-vgg9_bn-10/l2t-ww/seed-0"
    learned = json.loads((cell / "learned.json").read_text())
    assert len(learned["pairs"]) == 30
    assert {name[:2] for name in learned["pairs"]} == {"0:", "1:"}
    assert set(learned["source"]) == {"layer1", "layer2", "layer3"}
    assert "lwf_loss" in read_metrics(folder / "digits-vgg9_bn-10/lwf+at/seed-0/metrics.jsonl")[0]
    capsys.readouterr()
    main(["inspect", str(folder)])
    shown = capsys.readouterr().out
    assert "0:layer1" in shown
    assert "1:layer3" in shown
    assert (folder / "digits-vgg9_bn-10/inspect_l2t-ww.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_refused_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--runs", str(tmp_path), "--name", "bad", *SMALL]
    assert "give numbers of images" in refused(capsys, *given, "--per-class", "2,x")
    assert "--per-class 2 2: give at least one, and each once" in refused(capsys, *given, "--per-class", "2,2")
    assert "there is no method 'l2t'" in refused(capsys, *given, "--method", "l2t")
    assert "none of the methods given has that setting" in refused(
        capsys, *given, "--method", "scratch", "at", "--settings", "lwf.weight=1"
    )
    assert "is no setting of a method" in refused(capsys, *given, "--settings", "at.wight=1")
    assert "--source-weights has 1 values for 2 sources" in refused(
        capsys, *given[:-8], "--source", "resnet8", "resnet8", "--source-weights", "x.pt"
    )
    assert "--target-width has 1 values" not in refused(capsys, *given, "--target", "vgg9bn")
    assert "--mode graph needs a CUDA device" in refused(capsys, *given, "--mode", "graph", "--device", "cpu")
    assert "--jobs 0 is too small" in refused(capsys, *given, "--jobs", "0")
    assert "none of the methods can be had" in refused(capsys, *given, "--method", "finetune")
    assert not list(tmp_path.iterdir())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/something").touch()
    assert "is not the configuration of a run: give a folder that `l2t-fast table` made" in refused(capsys, *given)


def test_each_method_trains_with_its_own_settings(tmp_path: Path, inline: None) -> None:
    given = ["--epochs", "1", "--seeds", "0", "--method", "scratch", "fm-single", "--lr", "0.1"]
    table(tmp_path, "own", *given, "--settings", "scratch.lr=0.02", "fm-single.beta=0")
    table(tmp_path, "run", *given)
    first = {}
    for name in ("own", "run"):
        for method in ("scratch", "fm-single"):
            first[name, method] = read_metrics(tmp_path / name / f"digits-vgg9_bn-10/{method}/seed-0/metrics.jsonl")[0]
    assert [first[key]["lr"] for key in first] == [0.02, 0.1, 0.1, 0.1]
    assert first["own", "fm-single"]["matching_loss"] == 0 != first["run", "fm-single"]["matching_loss"]


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path: Path, inline: None) -> None:
    """A diverged training is a footnote, and is tried again the next time."""
    more = ["--beta", "1e39", "--epochs", "1", "--seeds", "0", "--method", "scratch", "fm-single"]
    with pytest.raises(SystemExit):  # so that scripts know
        table(tmp_path, "hot", *more)
    folder = tmp_path / "hot"
    assert "the matching loss of pairs (0, 2, 4) (source, m, n) is inf" in (folder / "table.md").read_text()
    assert [row["seeds"] for row in rows(folder)] == ["1", "0"]
    metrics = folder / "digits-vgg9_bn-10/fm-single/seed-0/metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        table(tmp_path, "hot", *more)
    assert metrics.stat().st_mtime_ns > before


def test_other_weights_of_the_same_name_are_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inline: None
) -> None:
    """A column was made with these very files."""
    pretrain = f"pretrain --runs {tmp_path} --network resnet8 --width 0.25 --epochs 1 --dataset digits --seed"
    for seed in "01":
        main([*pretrain.split(), seed, "--name", f"teacher{seed}"])
    weights = tmp_path / "teacher0/source.pt"
    given = ["--source", "resnet8", "--source-weights", str(weights), "--epochs", "1", "--method", "fm-single"]
    words = ["--target-width", "0.0625", "--source-width", "0.25", "--jobs", "1", "--threads", "1"]
    command = ["--runs", str(tmp_path), "--name", "t", *words, *given, "--seeds"]
    main(["table", *command, "0"])
    weights.write_bytes((tmp_path / "teacher1/source.pt").read_bytes())
    assert "was made with another --source-weights 1" in refused(capsys, *command, "0", "1")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_scheduler_that_stops_all_processes_loses_nothing(tmp_path: Path) -> None:
    """SIGTERM to the whole group, as soon as the processes begin: nothing fails, and what is under way is saved."""
    given = ["--epochs", "400", "--seeds", "0", "1", "--method", "scratch"]
    command = [sys.executable, "-m", "l2t_fast.cli", *arguments(tmp_path, "stopped", *given)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("stopped/digits*/scratch/seed-*/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped and saved" in told
    assert "not trained yet" in (tmp_path / "stopped/table.md").read_text()
    assert "ended with code" not in told
