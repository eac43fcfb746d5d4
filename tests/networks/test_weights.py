"""Weights from files, whatever the names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor

from l2t_fast.errors import L2TError
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.weights import checkpoint_classes, load_weights
from tests.networks.samples import same, small, weights

AUTHORS = Path(__file__).parents[3] / "shared/official/tinyimagenet-200-resnet32.pth.tar"


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


def test_checkpoint_classes_needs_a_classifier(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(4, 3, 3, 3), "conv.bias": torch.zeros(4)}, tmp_path / "file")
    with pytest.raises(L2TError, match="no linear classifier"):
        checkpoint_classes(tmp_path / "file", "resnet8")


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
