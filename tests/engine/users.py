"""What the tests of users' own modules share: a small target around one, an engine on it, and the oracle beside it."""

import copy
import random
import types
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2t_fast import L2T, Engine
from l2t_fast.reference import Reference, _State
from tests.engine.shared import flat, randomise

SIZE = 10
Build = Callable[[], nn.Module]
RULE = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "meta_lr": 1e-2}
# Schemes, numbers of steps, memory and rules, so that each meets each other over the cases.
WAYS: list[dict[str, Any]] = [
    {"scheme": "transfer", "inner_steps": 2, "memory": "save"},
    {"scheme": "simulation", "inner_steps": 5, "memory": "recompute"},
    {"scheme": "transfer", "inner_steps": 1, "memory": "recompute", "momentum": 0.0, "weight_decay": 0.0},
    {"scheme": "simulation", "inner_steps": 2, "memory": "save", "nesterov": True},
]


def ways(cases: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by cases, given by name or as classes and functions, and a way for each, taken in turn."""
    named = cases.items() if isinstance(cases, dict) else [(case.__name__, case) for case in cases]
    parameters = [pytest.param(case, WAYS[i % len(WAYS)], id=name) for i, (name, case) in enumerate(named)]
    return pytest.mark.parametrize(("case", "way"), parameters)


def batch(seed: int, size: int = 4, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, channels, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def source() -> nn.Module:
    seed_all(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()


def net(middle: nn.Module) -> nn.Sequential:
    """Images [B, 3, 10, 10]; the layer "0" is tapped, `middle` gets and gives [B, 4, 8, 8]."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), middle, *head).double()


def learner(target: nn.Module, layers: tuple[str, ...] = ("0",), **options: Any) -> L2T:
    seed_all(2)
    options = {"source_layers": ["0"], "example": batch(0)[0], **options}
    made = L2T(options.pop("source", None) or source(), target, target_layers=list(layers), **options)
    randomise(made)
    return made


def engine(target: nn.Module, layers: tuple[str, ...] = ("0",), **options: Any) -> Engine:
    settings = {**RULE, "say": lambda text: None, **{k: v for k, v in options.items() if k not in _NETWORKS}}
    return Engine(learner(target, layers, **{k: v for k, v in options.items() if k in _NETWORKS}), **settings)


_NETWORKS = {"source", "source_layers", "example", "logits", "layout", "pairs"}


Back = Callable[[], Any]
_TORCHS = {*vars(nn.Module())} - {"_buffers", "_modules", "training"}


def keeper(value: Any) -> Back:
    """What gives `value` back as it is now, whatever is written into it until then; a graph behind it is cut off."""
    if isinstance(value, Tensor):
        copied, own = value.detach().clone(), None if value.grad_fn is not None else value

        def back() -> Tensor:
            if own is None:
                return copied.clone()
            own.data.copy_(copied)
            return own

        return back
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, (random.Random, np.random.Generator)):
        twin = copy.deepcopy(value)
        return lambda: copy.deepcopy(twin)
    if isinstance(value, dict):
        items = {key: keeper(item) for key, item in value.items()}
        return lambda: (value.clear(), value.update({key: item() for key, item in items.items()}), value)[-1]
    if isinstance(value, types.SimpleNamespace):
        back = keeper(vars(value))
        return lambda: (back(), value)[1]
    if isinstance(value, tuple):
        held = [keeper(item) for item in value]
        return lambda: ([item() for item in held], value)[1]
    if isinstance(value, (list, deque)):
        elements = [keeper(item) for item in value]
        return lambda: (value.clear(), value.extend(item() for item in elements), value)[-1]
    return lambda: value


def _attributes(network: nn.Module) -> list[tuple[nn.Module, dict[str, Back]]]:
    return [(m, {k: keeper(v) for k, v in vars(m).items() if k not in _TORCHS}) for m in network.modules()]


def _put_back(kept: list[tuple[nn.Module, dict[str, Back]]]) -> None:
    for module, attributes in kept:
        for key in vars(module).keys() - attributes.keys() - _TORCHS:
            del vars(module)[key]
        vars(module).update({key: back() for key, back in attributes.items()})


@dataclass(frozen=True)
class _Kept(_State):
    attributes: list[tuple[nn.Module, dict[str, Back]]]


class Oracle(Reference):
    """The reference, which cares for what a user's modules keep beside buffers too: attributes, own generators.

    Between two steps the graphs of such state are cut off, as whoever trains by hand does.
    """

    def __init__(self, sources: nn.Module, target: nn.Module, **options: Any) -> None:
        kept = _attributes(target)
        super().__init__(sources, target, **options)
        _put_back(kept)

    def _save(self) -> _Kept:
        plain = super()._save()
        return _Kept(plain.tensors, plain.optimizer, plain.generators, _attributes(self.target))

    def _restore(self, state: _State) -> None:
        assert isinstance(state, _Kept)
        _put_back(state.attributes)
        super()._restore(state)

    def matching_loss(self, x: Tensor, beta: float = 1.0) -> Tensor:
        self._cut()
        return super().matching_loss(x, beta)

    def _org(self, x: Tensor, y: Tensor) -> Tensor:
        self._cut()
        return super()._org(x, y)

    def _losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self._cut()
        return super()._losses(x, y)

    def _cut(self) -> None:
        for module in self.target.modules():
            for table in (vars(module), module._buffers):
                for key, value in table.items():
                    if isinstance(value, Tensor) and value.grad_fn is not None:
                        table[key] = value.detach()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Relative to all of it; where all of it is zero but for rounding, so must both be."""
    assert actual.keys() == expected.keys()
    difference, size = (flat(actual) - flat(expected)).norm(), flat(expected).norm()
    assert difference <= 1e-10 * size + 1e-15, f"relative difference {difference / size:.1e}"


def both(
    build: Build, layers: tuple[str, ...] = ("0",), plainly: Build | None = None, **options: Any
) -> tuple[Engine, Oracle]:
    """An engine and the oracle in one state, each with a target of its own, the oracle's made `plainly` if given."""
    targets = []
    for make in (build, plainly or build):
        seed_all(3)
        targets.append(make())
    made = engine(targets[0], layers, **options)
    settings = {k: v for k, v in {**RULE, **options}.items() if k not in ("memory", "source", "layout", "pairs")}
    settings = {"source_layers": ["0"], "example": batch(0)[0], **settings}
    plain = Oracle(
        copy.deepcopy(options.get("source")) or source(),
        targets[1],
        target_layers=list(layers),
        pairs=made.learner.pairs,
        **settings,
    )
    with torch.no_grad():
        for p, q in zip(
            (*plain.projections.parameters(), *plain.phi.values()),
            (*made.learner.projections.parameters(), *made.trained.phi.values()),
            strict=True,
        ):
            p.copy_(q)
    return made, plain


def assert_same_training(
    build: Build,
    way: dict[str, Any],
    layers: tuple[str, ...] = ("0",),
    steps: int = 2,
    between: Callable[[nn.Module, int], None] = lambda target, step: None,
    plainly: Build | None = None,
    **options: Any,
) -> tuple[Engine, Oracle]:
    """Meta-gradients and all that is trained, over several steps; `between` changes the targets before a step."""
    made, plain = both(build, layers, plainly, **{**way, **options})
    for step in range(steps):
        found = []
        for one in (made, plain):
            between(one.learner.target if isinstance(one, Engine) else one.target, step)
            seed_all(10 + step)
            gradient = one.meta_gradient(*batch(step), batch(50 + step))
            seed_all(20 + step)
            one.step(*batch(step), batch(50 + step))
            found.append((gradient, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()))  # noqa: NPY002
        (ours, *mine), (theirs, *others) = found
        assert_close(ours, theirs)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(mine, others, strict=True))
        assert_close(*(trained(one) for one in (made, plain)))
        kept, theirs = (values(network) for network in (made.learner.target, plain.target))
        both_have = kept.keys() & theirs.keys() if plainly else kept.keys() | theirs.keys()
        assert_close(*({name: found[name] for name in both_have} for found in (kept, theirs)))
    return made, plain


def trained(one: Engine | Oracle) -> dict[str, Tensor]:
    """θ, φ and, where there is one, the momentum."""
    if isinstance(one, Engine):
        theta, phi, momentum = one.trained.theta, one.trained.phi, one.trained.momentum
    else:
        theta, phi, momentum = one.theta, one.phi, one.state_dict()["momentum"]
    rule = one.trained.rule.momentum if isinstance(one, Engine) else one.optimizer.param_groups[0]["momentum"]
    groups = {"theta": theta, "phi": phi, **({"momentum": momentum} if rule else {})}
    return {
        f"{g}.{n}".replace("_orig_mod.", ""): t.detach() for g, tensors in groups.items() for n, t in tensors.items()
    }


def values(network: nn.Module) -> dict[str, Tensor]:
    """All numbers that its modules keep: parameters, buffers, and what is in attributes, lists and dictionaries."""
    found: dict[str, Tensor] = {}

    def note(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name.replace("_orig_mod.", "")] = value.detach().double()
        elif isinstance(value, (bool, int, float)):
            found[name] = torch.tensor(float(value), dtype=torch.float64)
        elif isinstance(value, (dict, types.SimpleNamespace)):
            for key, item in (value if isinstance(value, dict) else vars(value)).items():
                note(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple, deque)):
            for i, item in enumerate(value):
                note(f"{name}.{i}", item)

    for prefix, module in network.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers") or key not in _TORCHS:
                note(f"{prefix}.{key}", value)
    return found
