"""Checkpoint files of all makers, and files that are none."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from l2t_fast.errors import L2TError
from l2t_fast.networks.weights import checkpoint_classes, load_weights
from tests.networks.samples import beneath, loads, refuses, same, small, weights


def test_unreadable_checkpoints(tmp_path: Path) -> None:
    model = small()
    before = weights(model)
    whole = tmp_path / "whole"
    torch.save(model.state_dict(), whole)
    content = whole.read_bytes()
    files = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "text": b"not a checkpoint\n" * 20,
        "random": bytes(torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0)).tolist()),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(L2TError, match=r"not a checkpoint that PyTorch can read"):
            load_weights(model, tmp_path / name)
    with pytest.raises(L2TError, match="no checkpoint file"):
        load_weights(model, tmp_path / "absent")
    for content_without_weights in ({"state_dict": {}, "epoch": 3}, [1, 2], torch.zeros(3)):
        torch.save(content_without_weights, tmp_path / "odd")
        with pytest.raises(L2TError, match="holds no weights"):
            load_weights(model, tmp_path / "odd")
    assert same(weights(model), before)


def test_checkpoints_of_timm(tmp_path: Path) -> None:
    saver = pytest.importorskip("timm.utils").CheckpointSaver
    model, average = small(), small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arguments = argparse.Namespace(model="resnet8", lr=0.1, opt_betas=None)
    ema = argparse.Namespace(module=average)
    checkpoints = saver(model, optimizer, arguments, model_ema=ema, checkpoint_dir=str(tmp_path), max_history=1)
    checkpoints.save_checkpoint(0, metric=1.0)
    loads(tmp_path / "last.pth.tar", weights(model))
    loads(f"{tmp_path / 'last.pth.tar'}:state_dict_ema", weights(average))


def test_checkpoints_of_torchvisions_scripts(tmp_path: Path) -> None:
    model = small()
    average = torch.optim.swa_utils.AveragedModel(small())
    rest = {"optimizer": {}, "epoch": 1, "args": argparse.Namespace(model="resnet8", lr=[0.1])}
    ema = {"model_ema": average.state_dict()}  # with a count, n_averaged, beside the network
    torch.save({"model": model.state_dict(), **ema, **rest}, tmp_path / "both")
    torch.save({**ema, **rest}, tmp_path / "average")
    loads(tmp_path / "both", weights(model))
    loads(f"{tmp_path / 'both'}:model_ema", weights(average.module))
    loads(tmp_path / "average", weights(average.module))


def test_checkpoints_under_keys_of_their_own(tmp_path: Path) -> None:
    """As PyTorch's tutorials, DeepSpeed, DINO and many repositories write them, at any depth."""
    model, teacher = small(), small()
    stepped = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    stepped.step()
    rest = {"optimizer_state_dict": stepped.state_dict(), "epoch": 1, "best": torch.tensor(float("inf"))}
    for name, content in {
        "tutorial": {"model_state_dict": model.state_dict()},
        "deepspeed": {"module": model.state_dict(), "optimizer": stepped.state_dict()},
        "deep": {"net": {"module": {"weights": beneath("_orig_mod.", weights(model))}}},
    }.items():
        torch.save({**content, **rest}, tmp_path / name)
        loads(tmp_path / name, weights(model))
    both = {"student": beneath("backbone.", weights(model)), "teacher": beneath("backbone.", weights(teacher))}
    torch.save({**both, **rest}, tmp_path / "dino")
    refuses(tmp_path / "dino", "several networks that fit, student.backbone, teacher.backbone")
    loads(f"{tmp_path / 'dino'}:teacher", weights(teacher))


def test_checkpoints_of_lightning(tmp_path: Path) -> None:
    model, teacher = small(), small()
    state = beneath("model.", weights(model)) | {"criterion.weight": torch.ones(4)}
    rest = {"epoch": 1, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1}}
    torch.save({"state_dict": state, **rest}, tmp_path / "one")
    loads(tmp_path / "one", weights(model))
    torch.save({"state_dict": state | beneath("ema_model.", weights(teacher)), **rest}, tmp_path / "averaged")
    loads(tmp_path / "averaged", weights(model))

    both = beneath("teacher.net.", weights(teacher)) | beneath("student.", weights(model))
    torch.save({"state_dict": both, **rest}, tmp_path / "two")
    refuses(tmp_path / "two", r"holds several networks that fit, teacher\.net, student; .* FILE:teacher\.net\.")
    with pytest.raises(L2TError, match="holds several networks"):
        checkpoint_classes(tmp_path / "two", "resnet8", 0.25)
    for prefix, expected in (("student", model), ("teacher.net", teacher), ("teacher", teacher)):
        loads(f"{tmp_path / 'two'}:{prefix}", weights(expected))
    refuses(f"{tmp_path / 'two'}:pupil", r"nothing beneath 'pupil'; its names begin with student, teacher\.")
    refuses(f"{tmp_path / 'three'}:student", "no checkpoint file .*three:student")


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = weights(small())
    for name in ("file.safetensors", "file"):
        save_file(beneath("model.", state), tmp_path / name)
        loads(tmp_path / name, state)
    content = (tmp_path / "file").read_bytes()
    for length in (0, 4, 100, len(content) // 2):
        (tmp_path / "cut.safetensors").write_bytes(content[:length])
        refuses(tmp_path / "cut.safetensors", r"not a checkpoint that PyTorch can read \(truncated")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refuses(tmp_path / "file", "is a safetensors file; run `pip install safetensors`")


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str, ...]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_objects_are_called_what_they_are_and_not_run(tmp_path: Path, archive: bool, protocol: int) -> None:
    trap, file = tmp_path / "trap", tmp_path / "file"
    module = f"a pickled module \\(class {re.escape(nn.Sequential.__module__)}.Sequential\\), which would run code"
    contents = [
        (nn.Sequential(nn.Linear(2, 2)), module),
        ({"epoch": 1, "model": nn.Sequential(nn.Linear(2, 2))}, module),
        ({"state_dict": weights(small()), "x": Harmful(trap)}, rf"a pickled object \({os.name}\.system\), which would"),
        ({"state_dict": weights(small()), "args": Path("x")}, r"a pickled object \(pathlib\."),
    ]
    for content, words in contents:
        torch.save(content, file, _use_new_zipfile_serialization=archive, pickle_protocol=protocol)
        refuses(file, words)
    file.write_bytes(pickle.dumps(Harmful(trap), protocol))
    refuses(file, rf"a pickled object \({os.name}\.system\)")
    assert not trap.exists()
    pickle.loads(file.read_bytes())
    assert trap.exists()  # it is a trap


def test_namespaces_and_scripts_are_called_what_they_are(tmp_path: Path) -> None:
    torch.save(argparse.Namespace(lr=0.1), tmp_path / "file")
    refuses(tmp_path / "file", "holds no weights but a Namespace; give a state dict")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "script"))
    refuses(tmp_path / "script", r"a TorchScript module, which would run code: save its state_dict\(\)")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, legacy: bool) -> None:
    class Malicious:
        def __reduce__(self) -> object:
            return open, (str(tmp_path / "executed"), "w")

    content = {"state_dict": {**weights(small()), "x": Malicious()}}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(L2TError, match=r"x.pt holds a pickled object \(.*open\), which would run code"):
        load_weights(small(), tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def test_tensors_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    """Twelve million classes in a few kilobytes: a view of one number."""
    state = {**weights(small()), "fc.weight": torch.zeros(1, 1).expand(12_000_000, 64)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(L2TError, match=r"'fc.weight' of .*x.pt is \[12000000, 64\], more than the file holds"):
        checkpoint_classes(tmp_path / "x.pt", "resnet8")


def test_packed_tensors_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(10_000, 64)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(L2TError, match=r"x.pt is not a checkpoint that PyTorch can read"):
        load_weights(small(), tmp_path / "x.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said_of_their_file(tmp_path: Path, value: float) -> None:
    model = small()
    before = weights(model)
    state = {name: tensor.clone() for name, tensor in before.items()}
    state["bn1.running_var"][0] = value
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(L2TError, match=r"x.pt is no good source: 'bn1.running_var' in it is not finite"):
        load_weights(model, tmp_path / "x.pt")
    assert same(weights(model), before)
