"""What is found before anything is made, by `train` as by `table`."""

import os
from pathlib import Path

import pytest

from l2t_fast.cli import main
from l2t_fast.settings.stored import load_config
from tests.data.samples import write_folder, write_npz
from tests.runs.commands import SMALL, refused, rows


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--mode graph --device cpu", "--mode graph needs a CUDA device, not cpu: leave it out"),
        ("--method scratch --classes 5", "one class of digits leaves nothing to tell apart: take two or more"),
        ("--method at --source-classes 1", "one class of digits leaves nothing to tell apart: take two or more"),
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


def test_images_that_are_skipped_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "images", count=4)
    good = tmp_path / "images/train/b/2.png"
    bad = good.rename(good.with_name(os.fsdecode(b"2\xff\n \xc3\xa9.png")))  # bytes that are no text, a new line
    bad.write_bytes(bad.read_bytes()[:50])
    given = f"--dataset folder --data-root {tmp_path / 'images'} --image-size 32 --target-width 0.0625 --epochs 1"
    given += f" --workers 0 --runs {tmp_path} --name run --method scratch"
    assert "is no readable image" in refused(capsys, *given.split(), command="train")
    main(["train", *given.split(), "--on-bad-image", "skip"])
    assert "folder: 1 images cannot be read and are left out; skipped-images.txt lists them" in capsys.readouterr().out
    assert (tmp_path / "run/skipped-images.txt").read_bytes() == os.fsencode(bad).replace(b"\n", rb"\n") + b"\n"
    for path in bad.parent.iterdir():
        path.write_bytes(b"no image")
    error = refused(capsys, *given.split(), "--on-bad-image", "skip", "--workers", "1", "--name", "b", command="train")
    assert error == "class 1 of folder has no training images that can be taken; add some."


def test_pretrain_says_its_own_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--runs", str(tmp_path), "--seed", "-1", command="pretrain")
    assert error == "--seed -1 is too small: give at least 0."
