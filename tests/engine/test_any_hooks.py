"""Hooks of the user's, on parameters and modules: they act in real and simulated steps alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.users import WAYS, assert_same_training, batch, engine, net, ways

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore")]

Change = Callable[[nn.Module], Any]
LAYERS = ("0", "2.0")


def target() -> nn.Module:
    return net(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()))


def on_parameter(hook: Callable[[Tensor], Tensor | None], name: str = "2.0.weight") -> Change:
    return lambda t: t.get_parameter(name).register_hook(hook)


def counted(t: nn.Module) -> None:
    """A hook that counts its calls on the module, and acts by the count."""
    t[2].count = 0

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        module.count += 1
        return output * (1 + 0.1 * module.count)

    t[2].register_forward_hook(hook)


def averaging(t: nn.Module) -> None:
    t[2].register_buffer("average", torch.zeros(4, dtype=torch.float64))

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        module.average = 0.9 * module.average + 0.1 * output.detach().mean((0, 2, 3))
        return output - module.average[:, None, None]

    t[2].register_forward_hook(hook)


CASES: dict[str, Change] = {
    "zeros": on_parameter(torch.zeros_like),
    "zeros of the tapped": on_parameter(torch.zeros_like, "0.weight"),
    "scaled": on_parameter(lambda g: 3 * g, "0.weight"),
    "clipped by norm": on_parameter(lambda g: g * 0.1 / g.norm().clamp(min=0.01)),
    "curved": on_parameter(lambda g: g * g.abs(), "2.0.bias"),
    "in place": on_parameter(lambda g: g.mul_(2)),
    "none": on_parameter(lambda g: None),
    "two": lambda t: [t[0].weight.register_hook(hook) for hook in (torch.tanh, lambda g: 2 * g)],
    "backward, none, of a convolution": lambda t: t[0].register_full_backward_hook(lambda m, gi, go: None),
    "backward, none, of the network": lambda t: t.register_full_backward_hook(lambda m, gi, go: None),
    "backward of a convolution": lambda t: t[2][0].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,)),
    "backward of a norm": lambda t: t[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,)),
    "backward, curved": lambda t: t[2].register_full_backward_hook(lambda m, gi, go: (gi[0] * gi[0].abs() + gi[0],)),
    "backward pre": lambda t: t[2].register_full_backward_pre_hook(lambda m, go: (go[0] * 2,)),
    "backward pre of a convolution": lambda t: t[0].register_full_backward_pre_hook(lambda m, go: (go[0].tanh(),)),
    "backward pre of the network": lambda t: t.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,)),
    "backward, older": lambda t: t[2][1].register_backward_hook(lambda m, gi, go: (gi[0] * 2,)),
    "forward": lambda t: t[2].register_forward_hook(lambda m, i, o: o * 2),
    "forward of the tapped": lambda t: t[0].register_forward_hook(lambda m, i, o: o * 2),
    "forward of the network": lambda t: t.register_forward_hook(lambda m, i, o: o * 2),
    "forward, always": lambda t: t[2].register_forward_hook(lambda m, i, o: o * 2, always_call=True),
    "forward, keywords": lambda t: t[2].register_forward_hook(
        lambda m, i, k, o: o + i[0] * (1 + len(k)), with_kwargs=True
    ),
    "forward pre": lambda t: t[2].register_forward_pre_hook(lambda m, i: (i[0].tanh(),)),
    "forward pre of the network": lambda t: t.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "forward pre, keywords": lambda t: t[2].register_forward_pre_hook(
        lambda m, i, k: ((i[0] * 2,), k), with_kwargs=True
    ),
    "counted": counted,
    "averaging": averaging,
}


@ways(CASES)
def test_hooks_act_in_every_step(case: Change, way: dict[str, Any]) -> None:
    def build() -> nn.Module:
        made = target()
        case(made)
        return made

    assert_same_training(build, way, LAYERS)


LATER: dict[str, Callable[[nn.Module], Any]] = {
    "parameter": lambda t: t[0].weight.register_hook(lambda g: 2 * g),
    "forward": lambda t: t[2].register_forward_hook(lambda m, i, o: 2 * o),
    "forward pre": lambda t: t[2][0].register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "backward": lambda t: t[2].register_full_backward_hook(lambda m, gi, go: (2 * gi[0],)),
}


@ways(LATER)
def test_hooks_come_and_go_after_the_engine_was_made(case: Change, way: dict[str, Any]) -> None:
    handles: dict[int, Any] = {}

    def between(network: nn.Module, step: int) -> None:
        if step == 1:
            handles[id(network)] = case(network)
        if step == 2:
            handles[id(network)].remove()

    assert_same_training(target, way, LAYERS, steps=3, between=between)


def test_under_a_hook_of_zeros_a_parameter_moves_by_weight_decay_alone() -> None:
    network = target()
    network[2][0].weight.register_hook(torch.zeros_like)
    start = network[2][0].weight.detach().clone()
    made = engine(network, LAYERS, momentum=0.0)
    made.step(*batch(0))
    torch.testing.assert_close(network[2][0].weight.detach(), start * (1 - 0.05 * 1e-2), rtol=1e-12, atol=0)


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_a_hook_that_removes_itself_acts_once(memory: Any) -> None:
    network, calls = target(), []

    def hook(g: Tensor) -> Tensor:
        calls.append(g)
        handle.remove()
        return torch.zeros_like(g)

    handle = network[2][0].weight.register_hook(hook)
    made = engine(network, LAYERS, momentum=0.0, memory=memory)
    made.meta_gradient(*batch(0))
    assert network[2][0].weight._backward_hooks  # simulated steps are as if they had not been
    calls.clear()
    start = network[2][0].weight.detach().clone()
    made.step(*batch(0))
    torch.testing.assert_close(network[2][0].weight.detach(), start * (1 - 0.05 * 1e-2), rtol=1e-12, atol=0)
    assert (len(calls), len(network[2][0].weight._backward_hooks)) == (1, 0)


def test_the_first_simulated_step_is_replayed_with_the_hook_that_it_removed() -> None:
    gradients = []
    for memory in ("save", "recompute"):
        torch.manual_seed(0)
        network = target()

        def hook(g: Tensor, network: nn.Module = network) -> Tensor:
            network[2][0].weight._backward_hooks.clear()
            return g * g.abs()

        network[2][0].weight.register_hook(hook)
        gradients.append(engine(network, LAYERS, memory=memory).meta_gradient(*batch(0)))
    for name, g in gradients[0].items():
        assert (g - gradients[1][name]).norm() <= 1e-10 * g.norm()


def test_ways_differ() -> None:
    """What the cases above take in turn."""
    assert {(way["scheme"], way["memory"]) for way in WAYS} == {
        (s, m) for s in ("transfer", "simulation") for m in ("save", "recompute")
    }
