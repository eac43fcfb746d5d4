"""Which layers of a network can be matched, and which of them are unless others are named.

As in the paper: the last layer of each resolution. Where all blocks work at one resolution, as in a ViT: the blocks at
a quarter, half, three quarters of the way, and the last. timm's networks say themselves where their stages end
(`feature_info`). The network runs once, on tensors that have shapes but no numbers, so that a large one costs no more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from l2t_fast.errors import L2TError, UnfitError
from l2t_fast.learner.layout import find_layout
from l2t_fast.learner.pairs import Shape
from l2t_fast.learner.taps import Call, Tap, Trial, check_module
from l2t_fast.learner.trail import AxisTrail
from l2t_fast.learner.undisturbed import undisturbed
from l2t_fast.networks.layers import usual_layers

Size = tuple[int, int]  # H, W

_ENOUGH = 3  # resolutions without stems, so that stems are passed over
_FEW = 0.1  # of parameters: those of a stem before the blocks


@dataclass
class Candidate:
    """A feature that can be matched.

    Attributes:
        layers: those that return it, from the inside out: `layer1.2.relu_1`, `layer1.2`, `layer1`.
        layout: "NCHW", "NHWC" or "tokens". shape: (C, H, W) of the map.
        parameters, weights: how many parameters, and how many weights (neither biases nor norms), have worked at its
            size by then.
    """

    layers: list[str]
    layout: str
    shape: Shape
    parameters: int
    weights: int

    @property
    def size(self) -> Size:
        """H, W."""
        return self.shape[1:]


class Layers(NamedTuple):
    """What `find_layers` has found."""

    candidates: dict[str, Candidate]  # by what it is called, in the order of the forward pass
    chosen: list[str]  # by falling resolution


def layers_of(module: nn.Module, example: Tensor, *, role: str, output: bool) -> list[str]:
    """The layers that are matched unless others are named: `usual_layers` where there are such, or `find_layers`."""
    return usual_layers(module) or find_layers(module, example, role=role, output=output).chosen


def find_layers(module: nn.Module, example: Tensor, *, role: str, output: bool) -> Layers:
    """All features of `module` that can be matched on images like `example` [B, C, H, W], and the choice among them.

    role: what the network is called in errors. output: whether its output is wanted, as a target's; it is no feature.

    Raises:
        L2TError: the network cannot run on such images. UnfitError: no layer of it gives a map.
    """
    check_module(module, role)
    seen = _Seen(module, role, *_run(module, example, role), output)
    chosen = _choose(seen, _told(seen, timm_stages(module)))
    if not chosen:
        raise UnfitError(
            f"no layer of the {role} gives a map whose rows and columns are known to be the image's: name the layers "
            "to match, and say their layout."
        )
    names = {id(candidate): _outermost(candidate, chosen) for candidate in chosen}
    called = {names.get(id(candidate)) or _outermost(candidate, chosen): candidate for candidate in seen.candidates}
    return Layers(called, [names[id(candidate)] for candidate in chosen])


def timm_stages(module: nn.Module) -> list[str]:
    """The layers where the stages of one of timm's networks end, as it says itself; of others none."""
    info = getattr(module, "feature_info", None)
    stages = getattr(info, "info", info)
    if not isinstance(stages, list | tuple):
        return []
    return [stage["module"] for stage in stages if isinstance(stage, Mapping) and isinstance(stage.get("module"), str)]


def _run(module: nn.Module, example: Tensor, role: str) -> tuple[Trial, Any]:
    """One forward pass with all modules watched, and its result; on true images where the network looks at numbers."""
    inner = {m for name, m in module.named_modules() if name}

    def run(make: Callable[..., Tensor]) -> tuple[Trial, Any]:
        x = make(2, *example.shape[1:], dtype=example.dtype, device=example.device)
        trial = Trial(inner, AxisTrail(x))
        return trial, trial.run(module, x, role)

    with torch.no_grad():
        try:
            with undisturbed(module, example.device), _without_numbers(module):
                return run(torch.empty)
        except Exception:  # whatever Python of the user's may raise on tensors without numbers
            with undisturbed(module, example.device):
                torch.manual_seed(0)
                return run(torch.randn)


def _without_numbers(module: nn.Module) -> FakeTensorMode:
    """The mode that the network's own tensors are of, if they are fake already."""
    tensors = (t for t in (*module.parameters(), *module.buffers()) if isinstance(t, FakeTensor))
    return next((t.fake_mode for t in tensors), None) or FakeTensorMode(allow_non_fake_inputs=True)


class _Seen:
    """What a forward pass has shown.

    Attributes:
        candidates: in the order of their calls. of: by the layers that return them.
        called: the modules that ran, as lists of them do not.
        parameters, weights: as of candidates, by size, in the whole pass.
    """

    def __init__(self, module: nn.Module, role: str, trial: Trial, result: Any, output: bool) -> None:
        self.modules = dict(module.named_modules())
        self.candidates: list[Candidate] = []
        self.of: dict[str, Candidate] = {}
        self.parameters: dict[Size, int] = {}
        self.weights: dict[Size, int] = {}
        self._role, self._trial = role, trial
        known: dict[tuple[int, int], Candidate | None] = {}  # by the tensor and how often it was written to
        calls = list(self._calls())
        self.called = {name for name, _, _ in calls}
        classifier = [name for name, _, _ in calls if isinstance(self.modules[name], nn.Linear | nn.Conv2d)][-1:]
        for name, number, call in calls:
            for layer, feature in _features(name if number is None else f"{name}_{number}", call.output):
                key = id(feature), call.versions[id(feature)]
                if key not in known:
                    found = self._candidate(name, number or 0, call, layer, feature)
                    known[key] = None if name in classifier or (output and feature is result) else found
                    self.candidates += [found] if found is not None and known[key] is found else []
                candidate = known[key]
                if candidate is not None:
                    candidate.layers.append(layer)
                    self.of[layer] = candidate

    def _calls(self) -> Iterator[tuple[str, int | None, Call]]:
        """(name of a module, which call of it if there are several, the call), in the order in which they return."""
        names = {inner: name for name, inner in self.modules.items()}
        calls = [
            (call.number, names[inner], k if len(calls) > 1 else None, call)
            for inner, calls in self._trial.calls.items()
            for k, call in enumerate(calls)
        ]
        return ((name, k, call) for _, name, k, call in sorted(calls, key=lambda entry: entry[0]))

    def _candidate(self, name: str, number: int, call: Call, layer: str, feature: Tensor) -> Candidate | None:
        """The feature, where it is a map that stays as it is."""
        module = self.modules[name]
        try:
            found = find_layout(feature, self._trial.trail, layer, self._role)
            size, own = found.shape[1:], list(module.parameters(recurse=False))
            self.weights[size] = self.weights.get(size, 0) + any(p.dim() > 1 for p in own)
            self.parameters[size] = self.parameters.get(size, 0) + (0 if number else sum(p.numel() for p in own))
            tap = Tap(layer, module, number, self._role, found, feature.shape[1])
            self._trial.check_overwritten([tap], self._role, to_the_end=True)
        except L2TError:
            return None
        if min(size) == 1:
            return None
        return Candidate([], found.layout, found.shape, self.parameters[size], self.weights[size])


def _features(layer: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of three or four axes that a call has returned, by the names that tap them."""
    entries: list[tuple[str, Any]] = [(layer, output)]
    if isinstance(output, Mapping):
        entries = [(f"{layer}[{key}]", value) for key, value in output.items()]
    elif isinstance(output, list | tuple):
        entries = [(f"{layer}[{i}]", value) for i, value in enumerate(output)]
    return ((name, v) for name, v in entries if isinstance(v, Tensor) and v.dim() in (3, 4) and not v.is_inference())


def _told(seen: _Seen, stages: Sequence[str]) -> list[Candidate]:
    """The features that the named layers return; none where one of them returns none.

    Of a list of blocks that of the last one, of a layer with several outputs the only map among them.
    """
    found: list[Candidate] = []
    for layer in stages:
        while layer not in seen.called and (inner := [name for name, _ in _children(seen, layer)]):
            layer = f"{layer}.{inner[-1]}"
        of_it = [seen.of[name] for name in seen.of if name == layer or name.startswith(f"{layer}[")]
        if len(of_it) != 1:
            return []
        found += of_it
    return found


def _children(seen: _Seen, layer: str) -> list[tuple[str, nn.Module]]:
    return list(seen.modules[layer].named_children()) if layer in seen.modules else []


def _choose(seen: _Seen, told: Sequence[Candidate]) -> list[Candidate]:
    """By falling resolution; told: where stages end, as the network says itself."""
    blocks = told if told and len({candidate.size for candidate in told}) == 1 else _blocks(seen)
    if blocks:
        count = len(blocks)
        return [blocks[i] for i in dict.fromkeys(-(-count * quarter // 4) - 1 for quarter in (1, 2, 3, 4))]
    last: dict[Size, Candidate] = {}
    for candidate in told or seen.candidates:
        if candidate.weights and (told or candidate.parameters >= _FEW * seen.parameters[candidate.size]):
            before = last.get(candidate.size)
            if before is None or told or _follows(seen, candidate, before):
                last[candidate.size] = candidate
    by_size = sorted(last.values(), key=lambda candidate: -candidate.size[0] * candidate.size[1])
    stages = [candidate for candidate in by_size if candidate.weights > 1]  # one weight alone is a stem
    return stages if len(stages) >= _ENOUGH else by_size


def _follows(seen: _Seen, candidate: Candidate, before: Candidate) -> bool:
    """Whether it goes on at its resolution: deeper inside lies the start of the block that leads to the next one.

    A block that only pools at its end belongs to the resolution before, if it has done most of the work there.
    """
    depth, most = _depth(seen, before), 2 * before.parameters < candidate.parameters
    return _depth(seen, candidate) <= depth or (most and _depth(seen, candidate, pooled=False) <= depth)


def _depth(seen: _Seen, candidate: Candidate, pooled: bool = True) -> int:
    """How many modules run around it; pooled: those count, too, that end with a pool."""

    def around(layer: str) -> list[str]:
        parts = layer.split(".")
        return [".".join(parts[:i]) for i in range(1, len(parts))]

    def counts(layer: str) -> bool:
        return layer in seen.called and (pooled or layer not in seen.of or seen.of[layer].weights > 0)

    return min(sum(map(counts, around(layer))) for layer in candidate.layers)


def _blocks(seen: _Seen) -> list[Candidate]:
    """The blocks of a network that works at one resolution, but for a stem; none of another one."""
    families: dict[tuple[str, type, str], list[str]] = {}  # siblings of one class, made of other layers
    for layer in seen.of:
        name, bracket, entry = layer.partition("[")
        if any(_children(seen, name)):
            kind = name.rpartition(".")[0], type(seen.modules[name]), bracket + entry
            families.setdefault(kind, []).append(layer)

    def parameters(family: list[str]) -> int:
        return sum(p.numel() for layer in family for p in seen.modules[layer.partition("[")[0]].parameters())

    alike = [f for f in families.values() if len(f) > 1 and len({seen.of[layer].shape for layer in f}) == 1]
    family = max(alike, key=parameters, default=[])
    if not family:
        return []
    elsewhere = sum(
        count for size, count in seen.parameters.items() if size != seen.of[family[0]].size and min(size) > 1
    )
    return [seen.of[layer] for layer in family] if elsewhere < _FEW * parameters(family) else []


def _outermost(candidate: Candidate, chosen: Sequence[Candidate]) -> str:
    """The outermost layer around the one that makes it, if none that is chosen lies inside, too."""
    first, others = candidate.layers[0], [other.layers[0] for other in chosen if other is not candidate]
    around = [layer for layer in candidate.layers if first.startswith(f"{layer}.")]
    free = [layer for layer in around if not any(other.startswith(f"{layer}.") for other in others)]
    return free[-1] if free else first
