"""What is found before anything is made, by `train` as by `table`."""

from pathlib import Path

import pytest

from l2t_fast.cli import main
from l2t_fast.settings.stored import load_config
from tests.data.samples import write_npz
from tests.runs.commands import SMALL, refused, rows


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--mode graph --device cpu", "--mode graph needs a CUDA device, not cpu: leave it out"),
        ("--method scratch finetune", "nothing of the source (CifarResNet) fits the target (CifarVGG)"),
        ("--method fm-single --target-layers nowhere", "no layer 'nowhere'"),
    ],
)
def test_a_run_is_refused_before_its_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, words: str
) -> None:
    assert words in refused(capsys, "--runs", str(tmp_path), *SMALL[:-4], *given.split(), command="train")
    assert not list(tmp_path.iterdir())


def test_images_that_are_too_small_for_vgg9(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npz(tmp_path / "mini.npz")
    given = f"--runs {tmp_path / 'runs'} --dataset npz --data-root {tmp_path / 'mini.npz'} --method scratch"
    error = refused(capsys, *given.split(), command="train")
    assert error.startswith("vgg9_bn needs images of 32 x 32 or more, not 12 x 12: give --image-size 32")
    assert not (tmp_path / "runs").exists()


def test_a_run_on_an_npz_file(tmp_path: Path) -> None:
    write_npz(tmp_path / "mini.npz")
    given = f"--dataset npz --data-root {tmp_path / 'mini.npz'} --image-size 32 --target-width 0.0625 --epochs 1"
    main(["train", "--runs", str(tmp_path), "--name", "run", "--method", "scratch", *given.split()])
    assert load_config(tmp_path / "run/config.json").data.image_size == 32
    (row,) = rows(tmp_path / "run")
    assert (row["method"], row["seeds"]) == ("scratch", "1")


def test_pretrain_says_its_own_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--runs", str(tmp_path), "--seed", "-1", command="pretrain")
    assert error == "--seed -1 is too small: give at least 0."
