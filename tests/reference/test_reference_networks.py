"""The oracle with networks of many kinds: hooks, modules, modes, layers and logits by place."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.reference import Reference
from l2t_fast.reference_networks import twice_differentiable
from tests.reference.shared import (
    CLASSES,
    PAIRS,
    assert_close,
    assert_equal_state,
    batch,
    block,
    build,
    flat,
    source_net,
    target_net,
)

pytestmark = pytest.mark.core


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def check_by_differences(reference: Reference) -> None:
    """The replayed meta-gradient against differences of L_meta, for which only first derivatives are taken."""
    seed_all()
    before, states_before = reference.state_dict(), states()
    train, val = batch(30), batch(40)
    gradient = flat(reference.meta_gradient(*train, val=val))
    assert_equal_state(reference.state_dict(), before)
    assert states() == states_before
    phi = {name: p.detach().clone() for name, p in reference.phi.items()}

    def meta_loss(offset: Tensor) -> Tensor:
        parts = offset.split([p.numel() for p in phi.values()])
        with torch.no_grad():
            for (name, p), part in zip(reference.phi.items(), parts, strict=True):
                p.copy_(phi[name] + part.view_as(p))
        seed_all()
        with twice_differentiable(replaced=True):
            return reference.simulate([train] * 2, val)[0]

    direction = F.normalize(gradient, dim=0)
    h = 1e-3
    near, far = (meta_loss(k * h * direction) - meta_loss(-k * h * direction) for k in (1, 2))
    torch.testing.assert_close(gradient @ direction, (8 * near - far) / (12 * h), rtol=1e-6, atol=0)


def curved(g: Tensor) -> Tensor:
    return 0.5 * g + 3 * g**2


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "parameter": lambda target: target[1][0].weight.register_hook(curved),
    "zero": lambda target: target[1][0].weight.register_hook(torch.zeros_like),
    "full backward": lambda target: target[4].register_full_backward_hook(lambda m, g, _: (curved(g[0]),)),
    "full backward pre": lambda target: target[4].register_full_backward_pre_hook(lambda m, g: (curved(g[0]),)),
    "forward": lambda target: target[4][0].register_forward_hook(lambda m, x, y: y.tanh()),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_hooks_act_on_the_gradient_of_a_step_and_on_no_other(hook: str, scheme: str) -> None:
    reference = build(smooth=True, where="softplus", scheme=scheme, inner_steps=1 + (scheme == "transfer"))
    without = flat(reference.meta_gradient(*batch(30), val=batch(40))) if scheme == "transfer" else None
    HOOKS[hook](reference.target)
    check_by_differences(reference)
    if without is not None:
        assert not torch.allclose(flat(reference.meta_gradient(*batch(30), val=batch(40))), without, rtol=1e-3)


class Coin(nn.Module):
    """Random numbers of Python and numpy, and a buffer that the output depends on and each forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(1.1)
        return x * (self.scale + 0.3 * random.random() + 0.3 * np.random.rand())  # noqa: NPY002


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)  # [B, N, C]
        return F.scaled_dot_product_attention(t, t, t).transpose(1, 2).view_as(x)


class Normalize(nn.Module):
    """Of pixels, the last row of which is padding."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(F.pad(x, (0, 0, 0, 1)))[:, :, 1:]


MIDDLE = [Coin(), Attention(), Normalize(), nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), nn.Hardswish()]


@pytest.mark.parametrize("middle", MIDDLE, ids=lambda middle: type(middle).__name__)
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_modules_of_many_kinds(middle: nn.Module, scheme: str) -> None:
    middle = copy.deepcopy(middle)
    torch.manual_seed(0)
    target = nn.Sequential(nn.AvgPool2d(2), block(3, 6, True), middle, nn.AvgPool2d(2), block(6, 4, True))
    target.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)])
    reference = Reference(
        source_net((1, 2), True).double(), target.double(), source_layers=["0", "1"], target_layers=["2", "4"],
        pairs=PAIRS, example=batch(0)[0], where="softplus", scheme=scheme, inner_steps=1 if scheme != "transfer" else 2,
    )  # fmt: skip
    if isinstance(middle, Coin):
        assert middle.scale == 1
    for seed in (10, 11):
        reference.step(*batch(seed), val=batch(20))
    check_by_differences(reference)


def test_modes_are_the_users() -> None:
    torch.manual_seed(0)
    target = target_net().double().eval()
    options: dict[str, Any] = {
        "source_layers": ["0"], "target_layers": ["1"], "pairs": [(0, 0, 0)], "example": batch(0)[0],
    }  # fmt: skip
    Reference(source_net((1,)).double(), target, **options)
    assert all(m.training for m in target.modules())
    norm = target[1][1]
    norm.eval()
    reference = Reference(source_net((1,)).double(), target, **options)
    assert [m for m in target.modules() if not m.training] == [norm]
    before = copy.deepcopy(norm.state_dict())
    reference.step(*batch(1))
    gradient = flat(reference.meta_gradient(*batch(2)))
    assert [m for m in target.modules() if not m.training] == [norm]
    assert all(torch.equal(norm.state_dict()[k], before[k]) for k in ("running_mean", "running_var"))
    norm.train()
    assert not torch.allclose(flat(reference.meta_gradient(*batch(2))), gradient, rtol=1e-3)


class Stages(nn.Module):
    """Features as tokens [B, 1 + N, C], in a list with the maps that they come from, and several outputs."""

    def __init__(self, plain: nn.Sequential, outputs: str) -> None:
        super().__init__()
        self.plain, self.stage, self.outputs = plain, _Stage(), outputs

    def forward(self, x: Tensor) -> Any:
        x = self.plain[:2](x)
        y = self.plain[2:](self.stage(x)[0])
        return {"tuple": (-y, y), "dict": {"aux": -y, "logits": y}, "plain": y}[
            self.outputs if self.training else "plain"
        ]


class _Stage(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        tokens = x.flatten(2).transpose(1, 2)
        return [x * 1, torch.cat([tokens[:, :1] * 3, tokens], 1)]


@pytest.mark.parametrize(("outputs", "logits"), [("tuple", 1), ("tuple", -1), ("dict", "logits"), ("plain", None)])
def test_layers_by_index_maps_and_logits_by_place(outputs: str, logits: int | str | None) -> None:
    plain = build()
    wrapped = build()
    target = Stages(wrapped.target, outputs)  # type: ignore[arg-type]
    options: dict[str, Any] = {"source_layers": ["0", "1"], "pairs": PAIRS, "example": batch(0)[0]}

    def to_map(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    torch.manual_seed(0)
    expected = Reference(plain.sources[0], plain.target, target_layers=["1", "4"], **options)
    torch.manual_seed(0)
    actual = Reference(
        wrapped.sources[0], target, target_layers=["stage[1]", "plain.4"], target_maps={"stage[1]": to_map},
        logits=logits, **options,
    )  # fmt: skip
    assert_close(actual.meta_gradient(*batch(1)), expected.meta_gradient(*batch(1)), 1e-12)
    maps = {"1": lambda x: 20 * x}
    torch.manual_seed(0)
    mapped = Reference(plain.sources[0], plain.target, target_layers=["1", "4"], source_maps=maps, **options)
    assert mapped.matching_loss(batch(1)[0]) > 1.5 * expected.matching_loss(batch(1)[0])
