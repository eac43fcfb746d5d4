"""Which entry of a checkpoint is which of the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.weights import load_weights
from tests.networks.samples import beneath, loads, refuses, small, stored, weights


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
        (("block2", "block1"), ("layer1", "layer2"), r"which of its block1\.0, block2\.0"),  # in which order?
        (("stem2", "block1"), ("layer1", "layer2"), r"which of its block1\.0, stem2\.0"),  # two ways to count
        (("stem1", "block2"), ("layer1", "layer2"), r"which of its block2\.0, stem1\.0"),
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


def test_numbered_blocks_of_other_names(tmp_path: Path) -> None:
    names = [f"stages{i}" for i in (2, 7, 10)]
    theirs, ours = Twins(*names), Twins("layer1", "layer2", "layer3")
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
