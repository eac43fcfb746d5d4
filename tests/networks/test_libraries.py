"""Networks by the names of others: torchvision's, timm's and functions of the user's; their weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from l2t_fast.errors import L2TError
from l2t_fast.networks.architectures import build_model, build_shapes
from l2t_fast.networks.libraries import called_model, is_file, ready_made
from l2t_fast.networks.weights import checkpoint_classes, load_weights

USERS = """
import torch
from torch import nn

PLANS = 3
_made = nn.Linear(2, 2)

class Net(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, num_classes)
    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))

class Zoo:
    @staticmethod
    def small():
        return Net(5)

def build(num_classes):
    return Net(num_classes)

def loaded():
    net = Net(2)
    nn.init.constant_(net.head.weight, 0.25)
    return net

def broken():
    raise KeyError("no plan")

def number():
    return 3

def options(**options):
    return Net(**options)

def handed_on(*args, **options):
    return Zoo.small(*args, **options)

def mistaken(**options):
    return Net(**options) + "a network"
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in the working directory, as a console script finds it, whose path has no such entry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "their_nets").mkdir()
    (tmp_path / "their_nets/__init__.py").write_text("")
    (tmp_path / "their_nets/zoo.py").write_text(USERS)
    (tmp_path / "their_nets/typo.py").write_text("import torch\nnn.Linear(2, 2)\n")
    for name in [name for name in sys.modules if name.startswith("their_nets")]:
        del sys.modules[name]
    return tmp_path


def classes(model: nn.Module) -> int:
    return int(model(torch.rand(2, 3, 32, 32)).shape[1])


def test_torchvision_by_its_name() -> None:
    named, bare = build_shapes("torchvision/resnet18", 4), build_shapes("resnet18", 4)
    assert [(n, p.shape) for n, p in named.named_parameters()] == [(n, p.shape) for n, p in bare.named_parameters()]
    with pytest.raises(L2TError, match=r"'torchvision/resnet8'; the nearest names are torchvision/resnet"):
        build_model("torchvision/resnet8", 4)  # the authors', not torchvision's


def test_shapes_of_a_network_that_looks_at_numbers_while_it_is_made() -> None:
    assert build_shapes("regnet_y_400mf", 4).get_parameter("fc.weight").shape[0] == 4


def test_functions_get_the_number_of_classes_where_they_take_it(users: Path) -> None:
    assert classes(build_model("their_nets.zoo:build", 4)) == 4
    assert classes(build_model("their_nets.zoo:Net", 4)) == 4
    assert classes(build_model("their_nets.zoo:Zoo.small", 4)) == 5  # it does not take it
    assert classes(called_model("their_nets.zoo:Net", None)) == 7
    assert classes(build_model("their_nets.zoo:options", 4)) == 4
    assert classes(build_model("their_nets.zoo:handed_on", 4)) == 5  # it takes it, what it calls does not
    with pytest.raises(L2TError, match="mistaken raised TypeError: unsupported operand"):
        build_model("their_nets.zoo:mistaken", 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("their_nets.zoo:broken", r"zoo:broken raised KeyError: 'no plan' \(zoo\.py, line 30\)\.$"),
        ("their_nets.zoo:number", "returned int, not a network: return a torch.nn.Module"),
        ("their_nets.zoo:biuld", "has no 'biuld'; it has build"),
        ("their_nets.zoo:PLANS", "is int, no function"),
        ("their_nets.zoo:_made", "is Linear, no function"),
        ("their_nets.zo:build", r"cannot be imported \(ModuleNotFoundError: No module named 'their_nets\.zo'\)"),
        ("their_nets.typo:build", r"cannot be imported \(NameError: name 'nn' is not defined \(typo\.py, line 2\)\)"),
        ("their_nets/zoo.py:build", "is not the name of a network"),
        ("hf-hub:timm/x", "is not the name of a network"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(users: Path, name: str, words: str) -> None:
    with pytest.raises(L2TError, match=words):
        build_model(name, 4)


def test_their_width_is_one(users: Path) -> None:
    with pytest.raises(L2TError, match="comes from a function of yours and has width 1 only"):
        build_model("their_nets.zoo:build", 4, 0.5)


def test_weights_of_a_function(users: Path) -> None:
    own = ready_made("their_nets.zoo:loaded", "own")
    assert (own.get_parameter("head.weight") == 0.25).all()
    with pytest.raises(L2TError, match=r"zoo:build raised TypeError: build\(\) missing"):
        ready_made("their_nets.zoo:build", "own")  # it cannot be called without a number of classes
    with pytest.raises(L2TError, match="'own' are those that a function of yours"):
        ready_made("resnet18", "own")
    with pytest.raises(L2TError, match="has weights of its own or in a file, not 'imagenet'"):
        ready_made("their_nets.zoo:loaded", "imagenet")
    made = build_model("their_nets.zoo:build", 4)
    torch.save(made.state_dict(), users / "net.pth")
    assert checkpoint_classes("net.pth", "their_nets.zoo:build") == 4
    again = build_model("their_nets.zoo:build", 4)
    load_weights(again, "net.pth")
    assert torch.equal(again.get_parameter("conv.weight"), made.get_parameter("conv.weight"))


def test_words_and_files() -> None:
    assert not any(map(is_file, ("imagenet", "pretrained", "own", "hf-hub:timm/x", "local-dir:/x")))
    assert all(map(is_file, ("x.pt", "runs/source.pth:model_ema", "own.safetensors", "C:/x.pt")))
    with pytest.raises(L2TError, match="'pretrained' are timm's weights: resnet18 is none of its networks"):
        ready_made("resnet18", "pretrained")


@pytest.mark.core
def test_timm_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(L2TError, match=r"timm/resnet10t needs timm .*: run `pip install 'l2t-fast\[timm\]'`\.$"):
        build_model("timm/resnet10t", 4)


def test_networks_of_timm() -> None:
    pytest.importorskip("timm")
    assert classes(build_model("timm/resnet10t", 4)) == 4
    with pytest.raises(L2TError, match=r"no network named 'timm/resnet10'; the nearest names are timm/resnet10"):
        build_model("timm/resnet10", 4)
    with pytest.raises(L2TError, match="comes from timm and has width 1 only"):
        build_model("timm/resnet10t", 4, 0.5)
    with pytest.raises(L2TError, match="'imagenet' are torchvision's weights: for timm/resnet10t give 'pretrained'"):
        ready_made("timm/resnet10t", "imagenet")
    with pytest.raises(L2TError, match=r"timm cannot make 'resnet10t.nonsense': Invalid pretrained tag"):
        build_model("timm/resnet10t.nonsense", 4)


def saved(folder: Path, classes: int = 6) -> nn.Module:
    """A resnet10t in `folder` as the hub has it."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet10t", num_classes=classes)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return model


def test_weights_of_timm_in_a_folder(tmp_path: Path) -> None:
    model = saved(tmp_path / "net")
    found = ready_made("timm/resnet10t", f"local-dir:{tmp_path / 'net'}")
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(L2TError, match=r"is a resnet10t, not a resnet18: give --source timm/resnet10t\."):
        ready_made("timm/resnet18", f"local-dir:{tmp_path / 'net'}")


def test_weights_of_the_hub_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    repo = tmp_path / "models--someone--net"  # as the hub's client lays its cache out
    model = saved(repo / "snapshots/0123")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = ready_made("timm/resnet10t", "hf-hub:someone/net")
    assert torch.equal(found.get_parameter("fc.weight"), model.get_parameter("fc.weight"))
    with pytest.raises(L2TError, match=r"'hf-hub:someone/else' of timm/resnet10t cannot be had .*downloaded before"):
        ready_made("timm/resnet10t", "hf-hub:someone/else")
    with pytest.raises(L2TError, match=r"'pretrained' of timm/resnet10t cannot be had .*downloaded before"):
        ready_made("timm/resnet10t", "pretrained")


def test_a_file_of_timm_weights(tmp_path: Path) -> None:
    model = saved(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "resnet10t"
    place = tmp_path / "model.safetensors"
    assert checkpoint_classes(place, "timm/resnet10t") == 6
    again = build_model("timm/resnet10t", 6)
    load_weights(again, place)
    assert torch.equal(again.get_parameter("conv1.0.weight"), model.get_parameter("conv1.0.weight"))
