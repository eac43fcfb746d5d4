"""`l2t-fast pretrain`: a source network and its checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from l2t_fast.cli import main
from l2t_fast.files import load_checkpoint
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import TrainConfig
from l2t_fast.settings.stored import save_config
from tests.runs.commands import refused


def test_pretraining_makes_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        f"pretrain --runs {tmp_path} --name teacher --network resnet8 --width 0.25 --epochs 2 --dataset digits "
        "--classes 0 1 2".split()
    )
    path = tmp_path / "teacher/source.pt"
    best = load_checkpoint(tmp_path / "teacher/scratch/seed-0/best.pt")["weights"]
    saved = torch.load(path, weights_only=True)
    assert saved["num_classes"] == 3
    assert all(torch.equal(saved["state_dict"][name], tensor) for name, tensor in best.items())
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    assert config["data"]["per_class"] is None  # all images, though digits are limited by default for targets
    path.unlink()
    main(f"pretrain --runs {tmp_path} --name teacher --resume".split())  # what it has done it does not do again
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["fc.weight"], best["fc.weight"])
    error = refused(
        capsys, "--runs", str(tmp_path), "--name", "teacher", "--resume", "--width", "1", command="pretrain"
    )
    assert "was made with --width 0.25, not 1.0" in error
    main(
        f"train --runs {tmp_path} --name student --source resnet8 --source-width 0.25 --source-weights {path} "
        "--target-width 0.0625 --epochs 1 --seeds 0 --method fm-single".split()
    )
    assert (tmp_path / "student/fm-single/seed-0/result.json").exists()


def test_without_validation_images_a_source_is_the_last_one(tmp_path: Path) -> None:
    main(
        f"pretrain --runs {tmp_path} --name teacher --network resnet8 --width 0.25 --epochs 1 --dataset digits "
        "--val-fraction 0".split()
    )
    state = load_checkpoint(tmp_path / "teacher/scratch/seed-0/last.pt")["engine"]
    saved = torch.load(tmp_path / "teacher/source.pt", weights_only=True)["state_dict"]
    assert torch.equal(saved["conv1.weight"], state["theta"]["target.conv1.weight"])
    assert torch.equal(saved["bn1.running_mean"], state["buffers"]["bn1.running_mean"])


def test_a_source_is_trained_again_from_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs", str(tmp_path)]
    tiny = "--network resnet8 --width 0.25 --epochs 1 --dataset digits --classes 0 1 --seed 2 --momentum 0.5"
    main(["pretrain", *runs, "--name", "one", *tiny.split()])
    again = ["pretrain", *runs, "--config", str(tmp_path / "one")]
    main([*again, "--name", "two"])
    main([*again, "--name", "three", "--momentum", "0.9", "--set", "seeds=0", "target.target_width=0.5"])
    config = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two", "three")}
    assert config["two"] == {**config["one"], "name": "two"}
    assert (tmp_path / "two/source.pt").read_bytes() == (tmp_path / "one/source.pt").read_bytes()
    target = {**config["one"]["target"], "target_width": 0.5}
    optim = {**config["one"]["optim"], "momentum": 0.9}  # given, though it is what would be so by itself
    assert config["three"] == {**config["one"], "name": "three", "target": target, "optim": optim, "seeds": [0]}

    error = refused(capsys, *again[1:], "--name", "one", "--resume", command="pretrain")
    assert error.startswith("--resume goes on with a run, and --config repeats one")
    save_config(resolve(TrainConfig()), tmp_path / "config.json")
    error = refused(capsys, *runs, "--config", str(tmp_path / "config.json"), command="pretrain")
    assert error.startswith(f"{tmp_path / 'config.json'} is not the configuration of a source: give a run that")
    error = refused(capsys, *runs, "--config", str(tmp_path / "none"), command="pretrain")
    assert "is not the configuration of a run" in error


def test_a_run_of_train_is_not_gone_on_with_as_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which may have several seeds."""
    (tmp_path / "run").mkdir()
    for seeds in ((0,), (0, 1)):
        save_config(resolve(TrainConfig(name="run", method=("scratch",), seeds=seeds)), tmp_path / "run/config.json")
        error = refused(capsys, "--resume", "--runs", str(tmp_path), "--name", "run", command="pretrain")
        assert "config.json is not the configuration of a source: give a run that `l2t-fast pretrain` made" in error
