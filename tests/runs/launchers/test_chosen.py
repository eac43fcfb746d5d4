"""What a table's options make of launchers, devices and numbers."""

import sys
from pathlib import Path

import pytest
import torch

from l2t_fast.errors import L2TError
from l2t_fast.runs.launchers import chosen
from l2t_fast.settings.options import TableConfig
from tests.runs.commands import SMALL, refused

CUDA = torch.device("cuda")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them; a process that is told so sees two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("share", "jobs"), [(None, 3), (1, 3), (0.6, 3), (0.5, 6), (0.25, 12), (0.3, 9), (0.1, 30)])
def test_cells_are_packed_on_all_visible_gpus(share: float | None, jobs: int, gpus: None, tmp_path: Path) -> None:
    config = TableConfig(gpus_per_cell=share, threads=2)
    assert chosen.cells_device(config) == CUDA
    assert chosen.choose(config, tmp_path, 100, CUDA)[1:] == (jobs, 2)
    assert chosen.choose(TableConfig(gpus_per_cell=share, jobs=5), tmp_path, 100, CUDA)[1] == 5


def test_gpus_are_called_as_the_user_does(monkeypatch: pytest.MonkeyPatch, gpus: None, tmp_path: Path) -> None:
    assert chosen._visible() == ["0", "1", "2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,MIG-x")
    assert chosen._visible() == ["3", "MIG-x"]


def test_the_device_elsewhere_is_what_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who starts cells need not have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for launcher in ("ray", "submitit"):
        assert chosen.cells_device(TableConfig(launcher=launcher, device="cuda")) == CUDA
        assert chosen.cells_device(TableConfig(launcher=launcher, gpus_per_cell=1)) == CUDA
        assert chosen.cells_device(TableConfig(launcher=launcher)).type == "cpu"
        with pytest.raises(L2TError, match="the cells run on the CPU"):
            chosen.cells_device(TableConfig(launcher=launcher, device="cpu", gpus_per_cell=0.5))
    with pytest.raises(L2TError, match="there is no GPU that PyTorch can use"):
        chosen.cells_device(TableConfig(device="cuda"))
    with pytest.raises(L2TError, match="Slurm gives whole GPUs"):
        chosen.cells_device(TableConfig(launcher="submitit", gpus_per_cell=0.5))


def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(L2TError, match=rf"pip install 'l2t-fast\[{module}\]'"):
            chosen.choose(TableConfig(launcher=module), tmp_path, 1, torch.device("cpu"))


def test_bad_options_are_refused_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--runs", str(tmp_path), "--name", "bad", *SMALL, "--method", "scratch", "--device", "cpu"]
    assert "--gpus-per-cell 2.0 is too large" in refused(capsys, *given, "--gpus-per-cell", "2")
    assert "the cells run on the CPU: leave it out" in refused(capsys, *given, "--gpus-per-cell", "0.5")
    assert "options of --launcher submitit" in refused(capsys, *given, "--submitit", "mem_gb=4")
    pytest.importorskip("submitit")
    given += ["--launcher", "submitit"]
    assert "mem_gb is no NAME=VALUE" in refused(capsys, *given, "--submitit", "mem_gb")
    for wrong in ("memory=4", "slurm_partitio=x", "cluster=nowhere", "mem_gb=much"):
        assert f"--submitit {wrong} is refused (" in refused(capsys, *given, "--submitit", wrong)
    assert not list(tmp_path.iterdir())
