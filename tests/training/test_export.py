"""Exported networks compute the same without anything of ours; a trained target is the user's module and no more."""

import copy
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import l2t_fast
from l2t_fast import L2TError
from l2t_fast.cli import main
from l2t_fast.files import load_checkpoint
from l2t_fast.training.export import FILES, check_formats, export
from tests.shared import batch, engine, learner

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """With a weight that has two names, dropout, and parameters that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.norm.running_mean.normal_()  # type: ignore[union-attr]
        self.head = nn.Linear(4, 4)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.conv(x)).relu()).mean((2, 3))
        return self.again(self.head(x))  # type: ignore[no-any-return]


def test_weights_have_the_users_names(tmp_path: Path) -> None:
    network = Tied()
    l2t_fast.export(network, tmp_path / "a.safetensors", X)
    state = load_file(tmp_path / "a.safetensors")
    assert state.keys() == network.state_dict().keys()
    other = Tied()
    other.norm.running_mean.zero_()  # type: ignore[union-attr]
    other.load_state_dict(state)
    assert torch.equal(other.eval()(X), network.eval()(X))


def test_a_program_of_torch_export(tmp_path: Path) -> None:
    network = Tied()
    export(network, tmp_path / "a.pt2", X)
    assert network.training  # as it was
    loaded = torch.export.load(tmp_path / "a.pt2")
    assert loaded.state_dict.keys() == network.state_dict().keys()
    assert "l2t" not in str(loaded.graph)
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(loaded.module()(x), network.eval()(x))


def test_a_model_of_onnx(tmp_path: Path) -> None:
    """By ONNX's own evaluator."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    network = Tied()
    export(network, tmp_path / "a.onnx", X)
    model = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}  # no operators but ONNX's own
    run = reference.ReferenceEvaluator(model)
    for size in (1, 5):
        x = torch.randn(size, 3, 8, 8)
        (logits,) = run.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), network.eval()(x))


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(L2TError, match=r"Branches cannot be exported as torch-export \(.*\): leave that out"):
        export(Branches(), tmp_path / "a.pt2", X)
    with pytest.raises(L2TError, match=r"a\.h5 says no format: give a name that ends in \.safetensors or \.pt2"):
        export(Tied(), tmp_path / "a.h5", X)
    with pytest.raises(L2TError, match=r"there is no folder .*none: make it"):
        export(Tied(), tmp_path / "none/a.safetensors", X)
    with pytest.raises(L2TError, match="there is no export format 'h5'"):
        check_formats(["h5"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(L2TError, match=r"pip install 'l2t-fast\[onnx\]'"):
        export(Tied(), tmp_path / "a.onnx", X)
    assert not list(tmp_path.iterdir())


def test_why_onnx_cannot_have_it(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    with pytest.raises(L2TError, match=r"as onnx \(.*data-dependent.*\): leave that out") as caught:
        export(Branches(), tmp_path / "a.onnx", X)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile])
def test_of_a_wrapped_network_what_is_inside(tmp_path: Path, wrapper: Any) -> None:
    network = Tied()
    export(wrapper(network), tmp_path / "a.safetensors", X)
    assert load_file(tmp_path / "a.safetensors").keys() == network.state_dict().keys()
    export(wrapper(network), tmp_path / "a.pt2", X)
    assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(X), network.eval()(X))


def test_weights_of_a_scripted_network(tmp_path: Path) -> None:
    network = Tied()
    export(torch.jit.script(network), tmp_path / "a.safetensors", X)
    assert load_file(tmp_path / "a.safetensors").keys() == network.state_dict().keys()


def test_a_trained_target_is_the_users_module_alone() -> None:
    """It pickles, it is copied, and gives the same without learner and engine."""
    subject = engine(learner(torch.float32))
    target = subject.learner.target
    fresh = copy.deepcopy(target)
    for _ in range(2):
        subject.step(*batch(0, 4, torch.float32))
    x = batch(1, 4, torch.float32)[0]
    for other in (pickle.loads(pickle.dumps(target)), copy.deepcopy(target)):
        assert torch.equal(other.eval()(x), target.eval()(x))
        assert list(map(type, other.modules())) == list(map(type, fresh.modules()))
        for ours, theirs in zip(other.modules(), fresh.modules(), strict=True):
            assert vars(ours).keys() == vars(theirs).keys()
            assert not ours._forward_hooks
            assert not ours._forward_pre_hooks
    assert target.state_dict().keys() == fresh.state_dict().keys()
    assert [type(p) for p in target.parameters()] == [nn.Parameter] * len(list(fresh.parameters()))
    fresh.load_state_dict(target.state_dict())
    assert torch.equal(fresh.eval()(x), target.eval()(x))


def test_a_run_exports_its_targets(tmp_path: Path) -> None:
    """With the weights that are best by validation; a run that is done does so when it is resumed."""
    tiny = ["--method", "scratch", "--seeds", "0", "--epochs", "2", "--target-width", "0.0625", "--name", "run"]
    main(["train", "--runs", str(tmp_path), *tiny, "--export", "safetensors"])
    cell = tmp_path / "run/scratch/seed-0"
    state = load_file(cell / FILES["safetensors"])
    best = load_checkpoint(cell / "best.pt")["weights"]
    assert state.keys() == best.keys()
    assert all(torch.equal(state[name], best[name]) for name in best)
    trained = (cell / "last.pt").stat().st_mtime_ns
    main(["train", "--runs", str(tmp_path), "--name", "run", "--resume", "--export", "safetensors", "torch-export"])
    assert (cell / FILES["torch-export"]).exists()
    assert (cell / "last.pt").stat().st_mtime_ns == trained


def test_what_cannot_be_exported_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("l2t_fast.training.export.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--runs", str(tmp_path), "--method", "scratch", "--export", "onnx"])
    assert stopped.value.code == 2
    assert "l2t-fast[onnx]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
