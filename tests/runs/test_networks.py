"""`l2t-fast inspect NETWORK`, and trainings of networks by the names of others."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.cli import main
from l2t_fast.engine.counts import count
from l2t_fast.learner.candidates import find_layers
from l2t_fast.runs.networks import inspect, inspect_anything, layer_grid, measure
from tests.learner.test_candidates import EXAMPLE, Tokens, pyramid
from tests.reports.shared import drawn

NETS = """
from torch import nn

def net(num_classes=5):
    def stage(c, d):
        return nn.Sequential(nn.Conv2d(c, d, 3, 2, 1), nn.BatchNorm2d(d), nn.ReLU(), nn.Conv2d(d, d, 3, 1, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return nn.Sequential(stage(3, 4), stage(4, 6), stage(6, 8), head)

def fixed():
    return net(3)
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "their_tiny.py").write_text(NETS)
    sys.modules.pop("their_tiny", None)
    return tmp_path


def said(what: str, target: str | None, size: int = 32) -> str:
    out = io.StringIO()
    inspect(what, target, size, 4, Console(file=out, width=200))
    return out.getvalue()


def test_inspect_says_layers_pairs_and_cost(users: Path) -> None:
    text = said("their_tiny:net", "their_tiny:fixed")
    assert "their_tiny:net: 0.01 M parameters" in text
    lines = [line.split("│")[1:6] for line in text.splitlines() if "chosen" in line]
    shapes = [("0", "4", "16 × 16"), ("1", "6", "8 × 8"), ("2", "8", "4 × 4")]
    assert [tuple(cell.strip() for cell in line[:3]) for line in lines] == shapes * 2
    assert "one iteration (9 pairs, T = 2) on 4 images of 32 × 32" in text
    assert "GB kept for backward" in text
    drawn(users / "inspect-their_tiny-net-their_tiny-fixed.png", 700)
    assert "(plain training)" in said("their_tiny:net", None)
    drawn(users / "inspect-their_tiny-net.png", 400)


def test_tokens_are_drawn_and_deep_layers_are_counted(users: Path) -> None:
    layers = find_layers(Tokens(4), EXAMPLE, role="target", output=True)
    grid = layer_grid(layers, layers.chosen)
    assert [line[0] for line in grid.lines if line[-1]] == [f"blocks.{i}" for i in range(4)]
    assert not any(line[0].count(".") > 1 for line in grid.lines)


def test_the_cost_is_that_of_an_iteration_that_is_computed() -> None:
    torch.manual_seed(0)
    engine = Engine(L2T(pyramid(), pyramid(), example=EXAMPLE), mode="eager", say=lambda text: None)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4) % 3
    true = count(lambda: engine.step(x, y))
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks = [pyramid(), pyramid()]
        found = measure(L2T(*networks, example=torch.empty(2, 3, 16, 16)), 4)
    assert found.flops == true.flops > 0
    assert found.saved_bytes == pytest.approx(true.saved_bytes, rel=0.05)
    assert found.peak_bytes == pytest.approx(true.peak_bytes, rel=0.05)


def test_inspect_tells_folders_from_networks(users: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(L2TError, match="runs/nowhere is no run"):
        inspect_anything("runs/nowhere", None, 32, 4, console)
    (users / "empty").mkdir()
    with pytest.raises(L2TError, match="empty is no run"):
        inspect_anything("empty", None, 32, 4, console)
    with pytest.raises(L2TError, match="resnet1 is not the folder of a run, and there is no network named 'resnet1'"):
        inspect_anything("resnet1", None, 32, 4, console)
    with pytest.raises(L2TError, match="--image-size 0 is too small"):
        inspect_anything("their_tiny:net", None, 0, 4, console)


COMMON = ["--dataset", "digits", "--epochs", "1", "--batch-size", "25", "--seeds", "0", "--device", "cpu"]
COMMON += ["--method", "l2t-ww"]


def test_a_run_and_a_table_of_functions(users: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    sys.modules.pop("their_tiny", None)
    import their_tiny  # type: ignore[import-not-found]

    torch.save(their_tiny.net(5).state_dict(), users / "net.pth")
    networks = ["--source", "their_tiny:net", "--source-weights", "net.pth", "--target", "their_tiny:net"]
    main(["train", *COMMON, *networks, "--name", "one"])
    made = torch.load(users / "runs/one/l2t-ww/seed-0/last.pt", weights_only=True)["made"]
    assert made["--target"] == "their_tiny:net"
    assert made["layers"] == "0, 1, 2 → 0, 1, 2"
    text = capsys.readouterr().out
    assert "0, 1, 2 → 0, 1, 2" in text
    assert "first step, on 25 images of 32x32" in text

    main(["table", *COMMON, *networks, "--name", "two", "--jobs", "1"])
    column = users / "runs/two/digits-their_tiny-net-10"
    assert json.loads((column / "config.json").read_text())["target"]["target"] == "their_tiny:net"
    assert (column / "l2t-ww/seed-0/result.json").exists()
    assert "their_tiny:net" in (users / "runs/two/table.md").read_text()

    networks = ["--source", "their_tiny:net", "--source-weights", "own", "--target", "their_tiny:fixed"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *COMMON, *networks, "--name", "three"])
    assert stop.value.code == 2
    assert "their_tiny:fixed has 3 outputs for 5 classes: let it take num_classes" in capsys.readouterr().err


def test_pretraining_names_its_folder(users: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    main(["pretrain", "--network", "their_tiny:net", "--dataset", "digits", "--epochs", "1", "--batch-size", "200"])
    path = users / "runs/pretrain-digits-their_tiny-net/source.pt"
    assert path.exists()
    assert f"--source their_tiny:net --source-weights {path.relative_to(users)}" in capsys.readouterr().out
