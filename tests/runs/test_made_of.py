"""A run goes on with what it was made of, or says what differs."""

import json
import shutil
from pathlib import Path

import pytest

from l2t_fast.choices import METHODS
from l2t_fast.cli import main
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import load_data
from l2t_fast.errors import L2TError
from l2t_fast.files import load_checkpoint, save_checkpoint
from l2t_fast.runs.made import inputs
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import OptimConfig, TrainConfig
from l2t_fast.settings.stored import load_config, save_config
from l2t_fast.training.log import read_metrics
from l2t_fast.training.state import check_made
from tests.data.samples import write_folder
from tests.runs.commands import SMALL, refused

QUICK = [*SMALL[:-4], "--method", "scratch", "fm-single", "--seeds", "0", "--epochs", "1", "--source-epochs", "1"]


def test_given_means_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is what would be so by itself."""
    (tmp_path / "run").mkdir()
    save_config(resolve(TrainConfig(name="run", optim=OptimConfig(beta=0.1))), tmp_path / "run/config.json")
    runs = ["--runs", str(tmp_path), "--name", "run", "--resume"]
    for given in (["--beta", "0.5"], ["--beta=0.5"]):
        error = refused(capsys, *runs, *given, command="train")
        assert error.startswith("the run was made with --beta 0.1, not 0.5: give the same settings again")


def test_checkpoints_are_bound_to_their_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--runs", str(tmp_path), "--name", "run", *QUICK])
    run = tmp_path / "run"
    resume = ["--runs", str(tmp_path), "--name", "run", "--resume"]

    # Settings edited by hand, of a cell that is done.
    whole = (run / "config.json").read_text()
    (run / "config.json").write_text(whole.replace('"beta": 0.5', '"beta": 0.7'))
    error = refused(capsys, *resume, command="train")
    assert error.startswith(f"scratch, seed 0: {run / 'scratch/seed-0/result.json'} was made with --beta 0.5, not 0.7")
    (run / "config.json").write_text(whole)

    def undone(method: str) -> Path:
        (run / method / "seed-0/result.json").unlink(missing_ok=True)
        return run / method / "seed-0/last.pt"

    # The checkpoint of another method, which fits: neither has meta-networks.
    scratch = undone("scratch")
    before = scratch.read_bytes()
    shutil.copy(run / "fm-single/seed-0/last.pt", scratch)
    error = refused(capsys, *resume, command="train")
    assert f"checkpoint {scratch} was made with --method fm-single, not scratch" in error
    scratch.write_bytes(before)

    # Settings that were edited by hand.
    config = json.loads((run / "config.json").read_text())
    for part, name, value, told in (
        ("optim", "lr", 0.5, "--lr 0.03, not 0.5"),
        ("data", "per_class", 9, "--per-class 10, not 9"),
    ):
        edited = json.loads(json.dumps(config))
        edited[part][name] = value
        (run / "config.json").write_text(json.dumps(edited))
        assert f"checkpoint {scratch} was made with {told}" in refused(capsys, *resume, command="train")
    (run / "config.json").write_text(json.dumps(config))

    # Another source.
    fm = undone("fm-single")
    source = run / "source/source.pt"
    kept = source.read_bytes()
    pretrain = f"pretrain --runs {tmp_path} --name other --network resnet8 --width 0.25 --epochs 1 --seed 7 --classes"
    main([*pretrain.split(), *"01234"])
    shutil.copy(tmp_path / "other/source.pt", source)
    assert f"checkpoint {fm} was made with other source weights" in refused(capsys, *resume, command="train")
    source.write_bytes(kept)

    main(["train", *resume])
    assert load_config(run / "config.json").optim.lr == 0.03
    assert (run / "scratch/seed-0/result.json").exists()


def test_a_training_is_bound_to_what_its_image_files_hold(tmp_path: Path) -> None:
    """Not to their names alone; where they lie is free."""
    write_folder(tmp_path / "images", count=10)
    found = []
    for place, change in (("images", ""), ("copy", ""), ("copy", "train/b/2.png"), ("copy", "test/a/1.png")):
        if place == "copy" and not change:
            shutil.copytree(tmp_path / "images", tmp_path / "copy")
        if change:  # another image of as many bytes
            content = bytearray((tmp_path / "copy" / change).read_bytes())
            content[-20] ^= 1
            (tmp_path / "copy" / change).write_bytes(content)
        found.append(inputs([], load_data(DataConfig(dataset="folder", data_root=tmp_path / place), 0)))
    assert found[0] == found[1]
    assert len({each["images in the files"] for each in found}) == 3
    with pytest.raises(L2TError, match=r"checkpoint x was made with other images in the files: put that back"):
        check_made("checkpoint x", found[1], found[2])
    check_made("checkpoint x", {"images": found[0]["images"]}, found[2])  # of an older version, which did not say


def test_each_method_learns_by_the_optimizer_and_the_loss_that_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--runs", str(tmp_path), "--name", "run"]
    quick = [*SMALL[:-4], "--seeds", "0", "--epochs", "1", "--source-epochs", "1", "--inner-steps", "1"]
    methods = [name for name in METHODS if name != "finetune"]  # for which the source would be a VGG
    given = ["--optimizer", "adamw", "--label-smoothing", "0.1", "--max-grad-norm", "0.5"]
    main(["train", *runs, *quick, "--method", *methods, *given])
    made = {"--optimizer": "adamw", "--label-smoothing": "0.1", "--max-grad-norm": "0.5", "--lr": "0.001"}
    for folder in [tmp_path / "run/source", *(tmp_path / "run" / method / "seed-0" for method in methods)]:
        checkpoint = load_checkpoint(folder / "last.pt")
        assert checkpoint["made"].items() >= made.items()
        assert checkpoint["engine"]["steps"]["steps"] == len(read_metrics(folder / "metrics.jsonl")) - 1
    error = refused(capsys, *runs, "--resume", "--label-smoothing", "0.2", command="train")
    assert error.startswith("the run was made with --label-smoothing 0.1, not 0.2: give the same settings again")


def test_what_was_made_before_there_was_a_choice_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints, results and settings that say nothing of it are of SGD, without clipping and smoothing."""
    runs = ["--runs", str(tmp_path), "--name", "run"]
    main(["train", *runs, *SMALL[:2], "--method", "scratch", "--seeds", "0", "--epochs", "1"])
    run, cell = tmp_path / "run", tmp_path / "run/scratch/seed-0"
    whole = json.loads((cell / "result.json").read_text())
    new = ("--optimizer", "--label-smoothing", "--max-grad-norm")
    result = {**whole, "made": {name: value for name, value in whole["made"].items() if name not in new}}
    checkpoint = load_checkpoint(cell / "last.pt")
    for name in new:
        del checkpoint["made"][name]
    save_checkpoint(cell / "last.pt", checkpoint)
    config = json.loads((run / "config.json").read_text())
    older = {**config, "optim": {k: v for k, v in config["optim"].items() if f"--{k.replace('_', '-')}" not in new}}

    for there in (True, False):
        (cell / "result.json").write_text(json.dumps(result))
        (run / "config.json").write_text(json.dumps(older))
        if not there:
            (cell / "result.json").unlink()
        for name, value in (("label_smoothing", 0.1), ("max_grad_norm", 1.0)):  # edited by hand
            (run / "config.json").write_text(json.dumps({**older, "optim": {**older["optim"], name: value}}))
            error = refused(capsys, *runs, "--resume", command="train")
            assert f"was made with --{name.replace('_', '-')} " in error
        (run / "config.json").write_text(json.dumps(older))
        main(["train", *runs, "--resume"])
        again = json.loads((cell / "result.json").read_text())
        assert {**again, "seconds": 0, "made": 0} == {**whole, "seconds": 0, "made": 0}
    assert json.loads((run / "config.json").read_text()) == config
