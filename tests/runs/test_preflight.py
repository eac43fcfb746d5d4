"""What is found before anything is made, by `train` as by `table`."""

from pathlib import Path

import pytest

from tests.runs.commands import SMALL, refused


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


def test_pretrain_says_its_own_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--runs", str(tmp_path), "--seed", "-1", command="pretrain")
    assert error == "--seed -1 is too small: give at least 0."
