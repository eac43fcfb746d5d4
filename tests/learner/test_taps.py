"""Tapped features against those that forward hooks record, and every network that cannot be tapped."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.learner.learner import L2T
from l2t_fast.learner.network import Network
from l2t_fast.learner.pairs import Shape

pytestmark = pytest.mark.core

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "resnet18": ["layer1", "layer2.0.conv1", "layer3", "layer4.1.conv2"],
    "vgg11_bn": ["0.2", "0.6", "0.27"],
    "mobilenet_v3_small": ["features.0", "features.1.block.1", "features.3", "features.12"],
    "densenet121": ["features.pool0", "features.denseblock1", "features.transition3", "features.denseblock4"],
    "efficientnet_b0": ["features.2", "features.3.0.block", "features.8"],
}


def vgg11_bn() -> nn.Module:
    """Torchvision's layers, with a classifier for 32x32 images (its own has 10^8 parameters)."""
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, 5))


def tap(module: nn.Module, layers: Sequence[str], x: Tensor = X, *, role: str, output: bool, **options: Any) -> Network:
    return Network(module, layers, x, role=role, output=output, **options)


def tap_target(module: nn.Module, layers: Sequence[str], x: Tensor = X, **options: Any) -> Network:
    return tap(module, layers, x, role="target", output=True, **options)


def hooked(module: nn.Module, layers: Sequence[str], x: Tensor) -> list[Tensor]:
    """The output of `module` on `x`, and copies of what its `layers` returned."""
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[name] = output.clone()

        return hook

    handles = [module.get_submodule(name).register_forward_hook(record(name)) for name in layers]
    output = module(x)
    for handle in handles:
        handle.remove()
    return [output, *(seen[name] for name in layers)]


def state_of(module: nn.Module) -> dict[str, object]:
    return {
        "parameters": [(id(p), p.requires_grad, p.detach().clone()) for p in module.parameters()],
        "buffers": [(id(b), b.clone()) for b in module.buffers()],
        "training": [m.training for m in module.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same_state(module: nn.Module, before: dict[str, object]) -> None:
    for key, value in state_of(module).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=f"{key} changed")


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_forward_hooks(name: str) -> None:
    torch.manual_seed(0)
    layers = NETWORKS[name]
    module = vgg11_bn() if name == "vgg11_bn" else torchvision.models.get_model(name, weights=None, num_classes=5)
    next(module.parameters()).requires_grad_(False)
    before = state_of(module)
    taps = tap_target(module, layers)
    assert_same_state(module, before)

    for training in (True, False):
        expected_from = copy.deepcopy(module).train(training)
        module.train(training)
        torch.manual_seed(1)
        expected = hooked(expected_from, layers, X)
        torch.manual_seed(1)
        features, logits, _ = taps.run(X)
        assert logits is not None
        for actual, wanted in zip([logits, *features], expected, strict=True):
            assert torch.equal(actual, wanted)
        for actual, wanted in zip(module.buffers(), expected_from.buffers(), strict=True):
            torch.testing.assert_close(actual, wanted)  # a twin takes the running variance from 1/σ: its last bits
        assert taps.shapes == tuple(tuple(feature.shape[1:]) for feature in features)
    assert taps.classes == 5

    source = tap(module.eval(), layers, X, role="source 0", output=False)
    features, logits, _ = source.run(X)
    assert logits is None
    assert all(torch.equal(*both) for both in zip(features, hooked(module, layers, X)[1:], strict=True))


class Toy(nn.Module):
    """Convolution, BatchNorm, what `middle` makes of it, and a classifier."""

    def __init__(self, middle: Callable[["Toy", Tensor], object] | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.relu_ = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.blocks = nn.ModuleList([nn.Identity()])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
        if self.middle is not None:
            h = self.middle(self, h)
        return self.fc(self.pool(self.last(h) * self.scale).flatten(1))


def iadd(_toy: Toy, h: Tensor) -> Tensor:
    h += 1
    return h


def set_slice(_toy: Toy, h: Tensor) -> Tensor:
    h[:, 0] = 0
    return h


def through_a_view(_toy: Toy, h: Tensor) -> Tensor:
    return h.view(h.shape[0], -1).relu_().view_as(h)


def unused_relu(_toy: Toy, h: Tensor) -> Tensor:
    F.relu(h, inplace=True)
    return h


def doubled_in_training(toy: Toy, h: Tensor) -> Tensor:
    if toy.training:
        h.mul_(2)
    return h


def branch_on_value(toy: Toy, h: Tensor) -> Tensor:
    return h if h.sum() > 0 else toy.relu(h)


OVERWRITES = {
    "module": lambda toy, h: toy.relu_(h),
    "function": lambda _, h: F.relu(h, inplace=True),
    "method": lambda _, h: h.clamp_(min=0),
    "view": through_a_view,
}


@pytest.mark.parametrize("role", ["target", "source 0"])
@pytest.mark.parametrize("name", OVERWRITES)
def test_a_feature_overwritten_in_place_is_refused(name: str, role: str) -> None:
    toy = Toy(OVERWRITES[name])
    before = state_of(toy)
    with pytest.raises(L2TError, match=rf"layer 'bn' of the {role} is overwritten in place by '[\w.]+': tap that"):
        tap(toy, ["bn", "last"], X, role=role, output=role == "target")
    assert_same_state(toy, before)
    tap(toy, ["conv", "last"], X, role=role, output=role == "target")


@torch.no_grad()
@pytest.mark.parametrize("middle", [iadd, *OVERWRITES.values()])
def test_what_overwrites_a_feature_does_not_matter_where_it_is_not_run(middle: Callable[[Toy, Tensor], Tensor]) -> None:
    """A source stops at its last tapped layer."""
    toy = Toy(middle).eval()
    (feature,) = tap(toy, ["bn"], X, role="source 0", output=False).run(X).features
    assert torch.equal(feature, toy.bn(toy.conv(X)))


@torch.no_grad()
def test_the_output_of_an_in_place_relu_is_a_feature() -> None:
    toy = Toy(OVERWRITES["module"]).eval()
    (feature,), logits, _ = tap_target(toy, ["relu_"]).run(X)
    assert torch.equal(feature, toy.bn(toy.conv(X)).relu())
    assert torch.equal(logits, toy(X))  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("middle", [unused_relu, doubled_in_training, set_slice, branch_on_value, iadd])
def test_whatever_python_is_in_the_forward_pass(middle: Callable[[Toy, Tensor], Tensor]) -> None:
    for training in (True, False):
        toy = Toy(middle).train(training)
        before = state_of(toy)
        taps = tap_target(toy, ["conv", "last"])
        assert_same_state(toy, before)
        features, logits, _ = taps.run(X)
        for actual, wanted in zip([logits, *features], hooked(toy, ["conv", "last"], X), strict=True):
            assert torch.equal(actual, wanted)  # type: ignore[arg-type]


def test_a_feature_overwritten_later_on_other_images_is_refused() -> None:
    toy = Toy(lambda toy, h: h if h.shape[2] == 32 else toy.relu_(h))
    network = tap_target(toy, ["bn"])
    network.run(X)
    with pytest.raises(L2TError, match=r"layer 'bn' of the target is overwritten in place later in the forward pass"):
        network.run(X[:, :, :16, :16])


def test_a_layer_that_is_not_always_called() -> None:
    toy = Toy(lambda toy, h: toy.relu(h) if h.shape[2] == 32 else h)
    network = tap_target(toy, ["relu"])
    with pytest.raises(L2TError, match=r"layer 'relu' of the target was not called in this forward pass"):
        network.run(X[:, :, :16, :16])


def returns_tuple(h: Tensor) -> tuple[Tensor, Tensor]:
    return h, h


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.make = make

    def forward(self, x: Tensor) -> object:
        return self.make(self.body(x))


@pytest.mark.parametrize(
    ("module", "layers", "message"),
    [
        (Toy(), ["con"], r"the target has no layer 'con': the nearest names are 'conv'"),
        (torchvision.models.resnet18(), ["layr1"], r"no layer 'layr1': the nearest names are 'layer1', .*'layer"),
        (Toy(), ["€"], r"no layer '€': the nearest names are 'conv', 'bn', "),
        (Toy(), ["unused"], r"layer 'unused' of the target is never called itself"),
        (Toy(), ["blocks"], r"layer 'blocks' of the target is never called itself.*: tap a "),
        (Toy(lambda t, h: t.relu(t.relu(h))), ["relu"], r"'relu' .* is called 2 times.* or one of 'relu_1'"),
        (Toy(), ["fc"], r"layer 'fc' is the output of the target, not a feature"),
        (nn.Sequential(nn.Sequential(Toy())), ["0.0"], r"layer '0.0' is the output of the target"),
        (Toy(), ["bn", "conv", "bn"], r"layers 'bn' and 'bn' of the target are the same feature: give it once"),
        (nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), Toy().pool, nn.Flatten(), nn.Linear(4, 2)), ["0", "0.0"],
         r"layers '0.0' and '0' of the target are the same feature"),
        (nn.Sequential(Toy().conv, Toy().pool, nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)), ["3"],
         r"layer '3' of the target gives \[2, 4\], which is no map: tap a layer that gives \[B, C, H, W\]"),
        (Returns(returns_tuple), ["body"], r"the target returns tuple, not one tensor of logits"),
        (Returns(lambda h: {"out": h}), ["body"], r"the target returns dict with .out., not one tensor of logits"),
        (Returns(lambda h: h.sum()), ["body"], r"the target returns \[\], not logits \[B, classes\]"),
        (Returns(lambda h: h.mean((0, 2, 3))), ["body"], r"the target returns \[4\] for 2 images: wrap it to return"),
        (Toy(), "conv", r"the layers of the target must be a list of names, not 'conv'"),
    ],
)  # fmt: skip
def test_what_cannot_be_tapped(module: nn.Module, layers: list[str], message: str) -> None:
    before = state_of(module)
    with pytest.raises(L2TError, match=message):
        tap_target(module, layers)
    assert_same_state(module, before)


def test_a_target_may_return_maps_and_a_source_that_is_asked_may_not() -> None:
    maps = Returns(lambda h: h + 1)
    assert tap_target(maps, ["body"]).output_shape == (4, 32, 32)
    with pytest.raises(L2TError, match=r"the source 0 returns \[2, 4, 32, 32\], not logits \[B, classes\]"):
        Network(maps, ["body"], X, role="source 0", output=True)


def test_a_layer_that_returns_a_tuple_is_refused() -> None:
    module = nn.Sequential(Returns(returns_tuple), Returns(returns_tuple))
    module[0].make, module[1].forward = returns_tuple, lambda pair: pair[0].mean((2, 3))
    with pytest.raises(L2TError, match=r"layer '0' of the target gives several features: .*'0\[0\]' \[2, 4, 32, 32\]"):
        tap_target(module, ["0"])


@torch.no_grad()
def test_one_of_several_features_is_tapped_by_its_place() -> None:
    module = nn.Sequential(Returns(lambda h: (h, h + 1)), Returns(returns_tuple))
    module[1].forward = lambda pair: pair[0].mean((2, 3))
    (feature,), _, _ = tap_target(module, ["0[1]"]).run(X)
    assert torch.equal(feature, module[0].body(X) + 1)


@torch.no_grad()
@pytest.mark.parametrize("key", ["logits", 1])
def test_the_logits_are_chosen_by_key_or_position(key: str | int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Toy()

        def forward(self, x: Tensor) -> object:
            return (
                {"aux": 2 * self.net(x), "logits": self.net(x)} if key == "logits" else (2 * self.net(x), self.net(x))
            )

    two = Two().eval()
    logits = tap_target(two, [], logits=key).run(X).logits
    assert torch.equal(logits, two.net(X))  # type: ignore[arg-type]
    with pytest.raises(L2TError, match=r"the target returns .*which has no logits='other': name another"):
        tap_target(two, [], logits="other")


def test_images_that_the_network_cannot_take() -> None:
    for role in ("target", "source 1"):
        with pytest.raises(L2TError, match=rf"the {role} cannot run on images \[2, 2, 32, 32\]: .*channels"):
            tap(Toy(), ["conv"], X[:, :2], role=role, output=role == "target")
    vit = torchvision.models.VisionTransformer(64, 32, num_layers=1, num_heads=1, hidden_dim=4, mlp_dim=4)
    with pytest.raises(L2TError, match=r"Expected 64 but got 32; give images of the size and depth that it takes"):
        tap_target(vit, ["encoder.layers"])


@torch.no_grad()
def test_the_second_call_of_a_module_has_a_name() -> None:
    toy = Toy(lambda t, h: t.relu(t.relu(h) - 1)).eval()
    taps = tap_target(toy, ["relu_1"])
    assert torch.equal(taps.run(X).features[0], (toy.bn(toy.conv(X)).relu() - 1).relu())


def test_mathematics_on_shapes_can_be_traced() -> None:
    assert tap_target(Toy(lambda _, h: h / math.sqrt(h.shape[1])), ["conv"]).shapes == ((4, 32, 32),)


def test_modes_that_differ_between_modules_are_kept() -> None:
    for training in (True, False):
        toy = Toy().train(training)
        toy.bn.train(not training)  # as in fine-tuning with frozen statistics
        before = state_of(toy)
        tap_target(toy, ["bn"])
        assert_same_state(toy, before)


@torch.no_grad()
def test_one_image_is_enough_of_an_example_and_dropout_draws_nothing() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4, 2)).train()
    before = state_of(module)
    shapes: tuple[Shape, ...] = tap_target(module, ["1"], X[:1]).shapes
    assert shapes == ((4, 1, 1),)
    assert_same_state(module, before)


@pytest.mark.parametrize("wrapped", [nn.DataParallel, lambda toy: torch.compile(toy, backend="eager")])
def test_wrappers_are_taken_off(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    toy, source = Toy(), Toy()
    options: dict[str, Any] = {"source_layers": ["bn"], "target_layers": ["bn"], "example": X}
    learner = L2T(wrapped(source), wrapped(toy), **options)
    assert learner.target is toy
    assert learner.sources[0] is source


def test_a_scripted_network_is_refused_with_what_to_give() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 2)))
    with pytest.raises(L2TError, match=r"the target is a scripted module: give the Python module that it was made of"):
        L2T([], scripted, source_layers=[], target_layers=[], pairs=[], example=X)


@torch.no_grad()
def test_after_a_change_of_dtype_module_and_learner_are_still_one() -> None:
    toy, source = Toy().double(), Toy().double()
    learner = L2T(source, toy, source_layers=["bn"], target_layers=["bn"], example=X.double())
    learner.to(torch.float32).eval()
    toy.unused.float()  # no part of the learner
    assert {p.dtype for p in (*learner.parameters(), *toy.parameters())} == {torch.float32}
    toy.fc.weight.fill_(0.5)
    toy.scale.fill_(2.0)
    toy.bn.running_mean.fill_(0.25)  # type: ignore[union-attr]
    assert torch.equal(learner.target_outputs(X)[0], toy.eval()(X))
    assert torch.equal(learner.source_features(X)[0], source.eval().bn(source.conv(X)))
