"""Checkpoints of any kind and naming."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from l2t_fast.errors import L2TError
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.weights import checkpoint_classes, load_weights

AUTHORS = Path(__file__).parents[3] / "shared/official/tinyimagenet-200-resnet32.pth.tar"


def small(num_classes: int = 4, width: float = 0.25) -> nn.Module:
    model = build_model("resnet8", num_classes, width)
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            value.copy_(torch.rand_like(value))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("naming", ["own", "prefixed", "twice prefixed", "foreign", "shuffled", "shuffled prefixed"])
def test_load_weights_whatever_the_names(tmp_path: Path, key: str | None, naming: str) -> None:
    model, other = small(), small()
    state = dict(model.state_dict())
    if "shuffled" in naming:
        state = dict(reversed(state.items()))
    if naming == "foreign":
        state = {re.sub(r"layer(\d)\.0", r"block\1", k).replace("fc", "head"): v for k, v in state.items()}
    if "prefixed" in naming:
        state = {("model.module." if "twice" in naming else "module.") + k: v for k, v in state.items()}
    torch.save({"epoch": 3, key: state} if key else state, tmp_path / "file")
    assert not same(weights(other), weights(model))
    load_weights(other, tmp_path / "file")
    assert same(weights(other), weights(model))
    assert checkpoint_classes(tmp_path / "file", "resnet8", 0.25) == 4


def test_load_weights_keeps_the_dtype_of_the_model(tmp_path: Path) -> None:
    model, other = small(), small().double()
    torch.save(model.state_dict(), tmp_path / "file")
    load_weights(other, tmp_path / "file")
    assert same(weights(other), {k: v.double() for k, v in weights(model).items()})


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"x.{k}" if k.startswith("conv1") else f"y.{k}": v for k, v in state.items()}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: weights(small(num_classes=5)), r"fc\.weight \[5, 16\] where the network has fc\.weight \[4, 16\]"),
        (lambda: renamed(weights(small(width=0.5))), r"x\.conv1\.weight \[8, 3, 3, 3\] where .* conv1\.weight \[4, 3"),
        (lambda: {**weights(small()), "more.weight": torch.zeros(2)}, "nothing for more.weight"),
        (lambda: dict(list(renamed(weights(small())).items())[:-1]), "nothing for fc.bias"),
        (
            lambda: {k.replace("running_mean", "mean"): v for k, v in renamed(weights(small())).items()},
            r"y\.bn1\.mean \[4\]",
        ),
        (lambda: {"weight": torch.zeros(3)}, "does not fit"),
    ],
)
def test_load_weights_says_the_first_difference(
    tmp_path: Path, state: Callable[[], dict[str, Tensor]], words: str
) -> None:
    torch.save(state(), tmp_path / "file")
    model = small()
    before = weights(model)
    with pytest.raises(L2TError, match=words):
        load_weights(model, tmp_path / "file")
    assert same(weights(model), before)


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


def test_checkpoint_classes_needs_a_classifier(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(4, 3, 3, 3), "conv.bias": torch.zeros(4)}, tmp_path / "file")
    with pytest.raises(L2TError, match="no linear classifier"):
        checkpoint_classes(tmp_path / "file", "resnet8")


def stored(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def beneath(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def loads(place: str | Path, expected: dict[str, Tensor]) -> None:
    """As resnet8 with 4 classes, the classes counted too."""
    assert checkpoint_classes(place, "resnet8", 0.25) == 4
    model = small()
    load_weights(model, place)
    assert same(weights(model), expected)


def refuses(place: str | Path, words: str, model: nn.Module | None = None) -> None:
    """In one line, with the model unchanged."""
    model = small() if model is None else model
    before = weights(model)
    with pytest.raises(L2TError, match=words) as caught:
        load_weights(model, place)
    assert "\n" not in str(caught.value)
    assert same(weights(model), before)


class Twins(nn.Module):
    """Two blocks of equal shape and a head, registered in the order of `names`."""

    def __init__(self, *names: str, head: str = "head") -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
        self.add_module(head, nn.Linear(3, 2))


def test_blocks_in_another_order_and_a_head_of_another_name(tmp_path: Path) -> None:
    theirs, ours = Twins("b", "a", head="classifier"), Twins("a", "b")
    for value in theirs.state_dict().values():
        value.copy_(torch.rand(value.shape))
    load_weights(ours, stored(theirs.state_dict(), tmp_path / "file"))
    found = theirs.state_dict()
    assert all(torch.equal(v, found[k.replace("head", "classifier")]) for k, v in weights(ours).items())


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (("x", "y"), ("a", "b"), r"which of its x\.0, y\.0 is which of the network's a\.0, b\.0"),
        (("y", "x"), ("block1", "block2"), r"which of its x\.0, y\.0 is which of the network's block1\.0, block2\.0"),
        (("left1", "right1"), ("block1", "block2"), r"which of its left1\.0, right1\.0"),
        (("block0", "block1"), ("block1", "block2"), r"its block0\.0 is which of the network's block2\.0"),  # a shift
        (("a", "x", "y"), ("a", "b"), r"which of its x\.0, y\.0 is which of the network's b\.0"),
        (("a", "x"), ("a", "b", "c"), r"it has nothing for|has .* where the network has"),
    ],
)
def test_names_that_leave_more_than_one_way(
    tmp_path: Path, theirs: tuple[str, ...], ours: tuple[str, ...], words: str
) -> None:
    refuses(stored(Twins(*theirs).state_dict(), tmp_path / "file"), words, Twins(*ours))


@pytest.mark.parametrize("reverse", [False, True])
def test_numbered_blocks_of_other_names(tmp_path: Path, reverse: bool) -> None:
    names = [f"stages{i}" for i in (2, 7, 10)]
    theirs, ours = Twins(*(reversed(names) if reverse else names)), Twins("layer1", "layer2", "layer3")
    for value in theirs.state_dict().values():
        value.copy_(torch.rand(value.shape))
    load_weights(ours, stored(theirs.state_dict(), tmp_path / "file"))
    for i, name in enumerate(names):
        assert torch.equal(theirs.get_submodule(name)[0].weight, ours.get_submodule(f"layer{i + 1}")[0].weight)


def test_one_name_an_entry_says_nothing(tmp_path: Path) -> None:
    state = {f"net{i}.part.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(weights(small()).items())}
    refuses(stored(state, tmp_path / "file"), "does not say which of its net0.part.weight")


def test_a_renamed_part_that_fits_one_place_only(tmp_path: Path) -> None:
    state = weights(small())
    loads(stored({k.replace("downsample", "shortcut"): v for k, v in state.items()}, tmp_path / "file"), state)


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


def test_another_network_beside_the_network(tmp_path: Path) -> None:
    model = small()
    other = beneath("teacher.", build_model("vgg9_bn", 7, 0.25).state_dict())
    loads(stored(beneath("student.", weights(model)) | other, tmp_path / "file"), weights(model))


def test_a_body_and_a_head(tmp_path: Path) -> None:
    state = weights(small())
    parts = {k.replace("fc.", "head.") if k.startswith("fc.") else f"backbone.{k}": v for k, v in state.items()}
    loads(stored(parts, tmp_path / "file"), state)
    extra = {k.replace("head.", "other."): v for k, v in parts.items() if k.startswith("head.")}
    refuses(stored(parts | extra, tmp_path / "file"), "which of its head, other is which of the network's fc")
    between = {"neck.weight": torch.ones(16, 16), "neck.bias": torch.ones(16)}
    refuses(stored(parts | between, tmp_path / "file"), r"the network has nothing for neck\.weight")


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_the_weight_of_a_loss_is_left_out(tmp_path: Path, prefix: str) -> None:
    state = weights(small())
    loads(stored(beneath(prefix, state | {"criterion.weight": torch.ones(4)}), tmp_path / "file"), state)
    deeper = beneath(prefix, state | {"layer4.conv1.weight": torch.ones(4, 4, 3, 3)})
    refuses(stored(deeper, tmp_path / "file"), r"the network has nothing for (mod\w+\.)?layer4\.conv1\.weight")


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


def authors_forward(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The ResNet32 of the checkpoint in its own names: three stage outputs and the logits."""

    def bn(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    def block(name: str, x: Tensor) -> Tensor:
        first, shortcut = state[f"{name}.conv1.weight"], state.get(f"{name}.downsample.0.weight")
        stride = 1 if shortcut is None else 2
        h = F.relu(bn(f"{name}.bn1", F.conv2d(x, first, stride=stride, padding=1)))
        h = bn(f"{name}.bn2", F.conv2d(h, state[f"{name}.conv2.weight"], padding=1))
        return F.relu(h + (x if shortcut is None else bn(f"{name}.downsample.1", F.conv2d(x, shortcut, stride=2))))

    x = F.relu(bn("bn1", F.conv2d(x, state["conv1.weight"], state["conv1.bias"], padding=1)))
    outputs = []
    for first, others in (("block1", "blocks2"), ("block3", "blocks4"), ("block5", "blocks6")):
        x = block(first, x)
        for i in range(4):
            x = block(f"{others}.{i}", x)
        outputs.append(x)
    return [*outputs, x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]]


@pytest.mark.skipif(not AUTHORS.exists(), reason="the authors' checkpoint is not here")
def test_authors_checkpoint_loads() -> None:
    assert checkpoint_classes(AUTHORS, "resnet32") == 200
    model = build_model("resnet32", 200)
    load_weights(model, AUTHORS)
    model.double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = torch.load(AUTHORS, map_location="cpu", weights_only=True)["state_dict"]
    expected = authors_forward({k: v.double() for k, v in state.items()}, x)
    features = create_feature_extractor(model, ["layer1", "layer2", "layer3", "fc"])(x)
    for ours, theirs in zip(features.values(), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()
