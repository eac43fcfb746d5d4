"""`l2t-fast table --export`: the trained target of each cell, in its folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from l2t_fast.cli import main
from l2t_fast.files import load_checkpoint
from l2t_fast.training.export import FILES

TINY = ["--method", "scratch", "--epochs", "1", "--target-width", "0.0625", "--jobs", "1", "--threads", "1"]


def command(runs: Path, *more: str) -> None:
    main(["table", "--runs", str(runs), "--name", "table", *TINY, *more])


def test_a_table_exports_each_cell_where_it_is_trained(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """By a worker process; the same command exports cells that are done, and trains none of them again."""
    command(tmp_path, "--seeds", "0", "1", "--export", "safetensors")
    assert json.loads((tmp_path / "table/table.json").read_text())["export"] == ["safetensors"]
    cells = [tmp_path / f"table/digits-vgg9_bn-10/scratch/seed-{seed}" for seed in (0, 1)]
    trained = [(cell / "last.pt").stat().st_mtime_ns for cell in cells]
    request.getfixturevalue("inline")
    for again in (False, True):
        if again:
            for cell in cells:
                (cell / FILES["safetensors"]).unlink()
            command(tmp_path, "--seeds", "0", "1", "--export", "safetensors", "--replicas", "2")
        for cell in cells:
            state, best = load_file(cell / FILES["safetensors"]), load_checkpoint(cell / "best.pt")["weights"]
            assert state.keys() == best.keys()
            assert all(torch.equal(state[name], best[name]) for name in best)
    assert [(cell / "last.pt").stat().st_mtime_ns for cell in cells] == trained


def test_an_export_that_fails_after_the_training_is_told_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inline: None
) -> None:
    command(tmp_path, "--seeds", "0")
    (tmp_path / "table/digits-vgg9_bn-10/scratch/seed-0/best.pt").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        command(tmp_path, "--seeds", "0", "--export", "safetensors")
    assert stopped.value.code == 2
    assert "best.pt" in (tmp_path / "table/table.md").read_text()
    assert "some cells have failed: the table says why" in capsys.readouterr().err


def test_a_table_tries_the_export_also_where_its_first_method_does_not_suit_the_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("l2t_fast.training.export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["table", "--runs", str(tmp_path), "--method", "finetune", "scratch", "--seeds", "0", "--export", "onnx"])
    assert stopped.value.code == 2
    assert "l2t-fast[onnx]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
