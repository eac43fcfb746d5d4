"""The command line, as a user meets it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from l2t_fast import Engine
from l2t_fast.cli import main
from l2t_fast.files import load_checkpoint
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import TrainConfig
from l2t_fast.settings.stored import load_config, save_config
from l2t_fast.training.log import read_metrics

SHARED = Path(__file__).parents[2] / "shared"
SMALL = ["--target-width", "0.0625", "--source-width", "0.25", "--source-epochs", "1"]


def train(runs: Path, *arguments: str) -> None:
    main(["train", "--runs", str(runs), *SMALL, *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that a command is refused with."""
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("l2t-fast: ")
    assert "Traceback" not in error
    return error.removeprefix("l2t-fast: ")


@pytest.mark.parametrize("command", ["", "train", "table", "pretrain", "inspect"])
def test_help_does_not_load_torch(command: str) -> None:
    """Loading it takes seconds."""
    script = f"""
import sys
from l2t_fast.cli import main
try:
    main({[*command.split(), "--help"]})
except SystemExit as exit_:
    assert not exit_.code
print(*{{"torch", "torchvision", "matplotlib", "scipy"}}.intersection(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "usage: l2t-fast" in done.stdout
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given: str | None) -> None:
    """It is read when torch is loaded: the environment must say so before."""
    script = """
import os, sys
from l2t_fast import cli
def seen(config, console, given):
    assert "torch" not in sys.modules
    print(os.environ["OMP_WAIT_POLICY"])
import types
sys.modules["l2t_fast.runs.run"] = types.SimpleNamespace(run=seen)
cli.main(["train"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == (given or "passive")


def test_the_main_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Source training, both methods, two seeds, table and pictures, on a short schedule."""
    train(tmp_path, "--name", "job", "--epochs", "2", "--seeds", "0", "1")
    run = tmp_path / "job"
    table = list(csv.DictReader((run / "table.csv").open()))
    assert [row["method"] for row in table] == ["scratch", "l2t-ww"]
    assert all(row["seeds"] == "2" for row in table)
    results = [json.loads((run / f"l2t-ww/seed-{seed}/result.json").read_text()) for seed in (0, 1)]
    assert all(result["iterations"] == 4 for result in results)
    mean = 50 * sum(result["test_accuracy_last"] for result in results)
    assert float(table[1]["last_mean"]) == pytest.approx(mean)
    assert f"{mean:.2f} ± " in (run / "table.md").read_text()
    assert "l2t-ww" in capsys.readouterr().out
    for picture in ("curves.png", "table.png", "l2t-ww/seed-0/pair_weights.png", "l2t-ww/seed-1/channel_weights.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert "target.conv1.weight" in load_checkpoint(run / "source/last.pt")["engine"]["theta"]  # all of it was trained
    rows = read_metrics(run / "l2t-ww/seed-0/metrics.jsonl")
    assert len(rows[0]["pair_weights"]) == 15
    assert {"loss", "accuracy", "matching_loss", "meta_loss", "lr"} <= rows[0].keys()
    # The same source and the same target at the start: the first cross entropy is that of the method without a source.
    assert rows[0]["loss"] == read_metrics(run / "scratch/seed-0/metrics.jsonl")[0]["loss"]
    # A finished run that is resumed trains nothing again and gives the same table.
    before = (run / "l2t-ww/seed-0/last.pt").stat().st_mtime_ns
    main(["train", "--runs", str(tmp_path), "--name", "job", "--resume"])
    assert list(csv.DictReader((run / "table.csv").open())) == table
    assert (run / "l2t-ww/seed-0/last.pt").stat().st_mtime_ns == before
    # What a run has learned can teach the next one.
    small = f"--source-width 0.25 --target-width 0.0625 --source-weights {run / 'source/best.pt'}"
    main(f"train --runs {tmp_path} --name next {small} --method l2t-ww --seeds 0 --epochs 1".split())
    assert not (tmp_path / "next/source").exists()


def test_interrupt_saves_and_resume_goes_on(tmp_path: Path) -> None:
    """Ctrl-C in the middle, then --resume, gives what an undisturbed run gives."""
    arguments = ["train", *SMALL, "--method", "l2t-ww", "--seeds", "0", "--epochs", "6", "--name", "run"]
    command = [sys.executable, "-m", "l2t_fast.cli", *arguments, "--runs", str(tmp_path / "stopped")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: another number sums in another order
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread)
    checkpoint = tmp_path / "stopped/run/l2t-ww/seed-0/last.pt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped and saved" in error
    assert not (checkpoint.parent / "result.json").exists()

    main(["train", "--runs", str(tmp_path / "stopped"), "--resume"])
    main([*arguments, "--runs", str(tmp_path / "whole")])
    for name in ("theta", "phi", "momentum"):
        ours = load_checkpoint(checkpoint)["engine"][name]
        theirs = load_checkpoint(tmp_path / "whole/run/l2t-ww/seed-0/last.pt")["engine"][name]
        for key in theirs:
            assert torch.equal(ours[key], theirs[key])


def test_a_preemption_in_a_slow_batch_is_that_batch_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while a batch is computed: it is finished and saved, and no other is begun."""
    step, steps = Engine.step, 0

    def slow(engine: Engine, *batch: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return step(engine, *batch)

    monkeypatch.setattr(Engine, "step", slow)
    given = [*SMALL[:2], "--method", "scratch", "--seeds", "0", "--epochs", "2", "--batch-size", "10", "--name", "run"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *given, "--runs", str(tmp_path)])
    assert stopped.value.code == 143
    assert steps == 3
    cell = tmp_path / "run/scratch/seed-0"
    state = load_checkpoint(cell / "last.pt")["state"]
    assert (state["epoch"], state["iteration"]) == (0, 3)
    assert [row["iteration"] for row in read_metrics(cell / "metrics.jsonl")] == [0, 1, 2]


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs", str(tmp_path)]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/something").touch()
    assert "old exists already: give another --name, or go on with it by --resume" in refused(
        capsys, *runs, "--name", "old"
    )
    assert "is not the configuration of a run" in refused(capsys, *runs, "--name", "old", "--resume")
    assert "there is no run under" in refused(capsys, "--runs", str(tmp_path / "none"), "--resume")
    missing = refused(capsys, *runs, "--dataset", "cifar10", "--data-root", str(tmp_path), "--source-weights", "x")
    assert "l2t-fast train --dataset cifar10" in missing
    assert "--download" in missing
    assert "there is no checkpoint file nowhere.pt" in refused(capsys, *runs, "--source-weights", "nowhere.pt")
    assert "no layer 'features.3x': the nearest names are 'features.3'" in refused(
        capsys, *runs, "--target-layers", "features.3x"
    )
    assert "nearest names are vgg9_bn" in refused(capsys, *runs, "--target", "vgg9bn")
    assert "inner_steps=-1 is not to be had" in refused(capsys, *runs, "--inner-steps", "-1")
    assert "--epochs 0 is too small: give at least 1" in refused(capsys, *runs, "--epochs", "0")
    assert "--seeds 0 0: give at least one, and each once" in refused(capsys, *runs, "--seeds", "0", "0")
    assert "batches of 1 are too small: BatchNorm needs 2" in refused(capsys, *runs, "--batch-size", "1")
    assert "digits has classes 0 to 9" in refused(capsys, *runs, "--source-classes", "0", "12")
    assert "there are none: hold some out" in refused(capsys, *runs, "--scheme", "simulation", "--val-fraction", "0")
    assert "not a checkpoint that PyTorch can read" in refused(capsys, *runs, "--source-weights", __file__)
    assert "has no weights: give --source-weights" in refused(capsys, *runs, "--classes", "1", "2")
    if not torch.cuda.is_available():
        assert "there is no GPU" in refused(capsys, *runs, "--device", "cuda")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]  # nothing is left behind


def test_a_run_that_diverges_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--runs", str(tmp_path), *SMALL, "--method", "l2t-ww", "--seeds", "0", "--lr", "1e6", "--name", "run"]
    error = refused(capsys, *arguments)
    assert "at epoch 0, iteration" in error
    assert "lower the learning rate or beta" in error


def test_resume_refuses_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve(TrainConfig(runs=tmp_path, name="run"))
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run/config.json")
    assert load_config(tmp_path / "run/config.json") == config
    error = refused(capsys, "--runs", str(tmp_path), "--name", "run", "--resume", "--lr", "0.3")
    assert "was made with --lr 0.03, not 0.3" in error


@pytest.mark.skipif(not (SHARED / "data/FashionMNIST").exists(), reason="Fashion-MNIST is not there")
def test_fashion_mnist_with_the_authors_source(tmp_path: Path) -> None:
    """Their ResNet32, a narrow VGG9 that learns from two images a class, one epoch."""
    weights = SHARED / "official/tinyimagenet-200-resnet32.pth.tar"
    main(
        f"train --runs {tmp_path} --name run --dataset fashion-mnist --data-root {SHARED / 'data'} --source resnet32 "
        f"--source-weights {weights} --target vgg9_bn --target-width 0.0625 --per-class 2 --epochs 1".split()
    )
    (row,) = list(csv.DictReader((tmp_path / "run/table.csv").open()))
    assert row["method"] == "l2t-ww"
    assert 0 < float(row["last_mean"]) < 100
    assert not (tmp_path / "run/source").exists()
