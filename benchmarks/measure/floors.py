"""The least that must be moved and computed, and how long that takes at the rates measured on the device.

matching     every input of an operator read once, every output written once
a network    every convolution reads its input and weight and writes its output once; everything else
             (normalisation, activation, pooling, the classifier) costs nothing
backward     as many FLOPs and bytes as forward for the gradient of the input, and again for that of the weight
its adjoint  reverse over reverse: two forward passes for the cotangent of the gradient, one more of each backward
             product for that of input and weight, and then the backward pass of the forward pass
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.measure.rates import DTYPES
from benchmarks.rows import Row
from benchmarks.shapes import Features

# Matching, in units of the product r T for all pairs.
UNITS = {"gradient": 3, "adjoint": 7, "first step": 3, "distances": 1}


@dataclass(frozen=True)
class Work:
    """Bytes moved and FLOPs, at least."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __rmul__(self, times: float) -> "Work":
        return Work(times * self.bytes, times * self.flops)


def floor(work: Work, rates: dict[str, float], precision: str, ms: float) -> Row:
    """What a row says of its floor; `ms` is what was measured."""
    floors = {"bytes": 1e3 * work.bytes / rates["copy"], "flops": 1e3 * work.flops / rates[precision]}
    bound = max(floors, key=lambda kind: floors[kind])
    return {
        "floor_ms": floors[bound],
        "floor_bound": bound,
        "floor_bytes": work.bytes,
        "floor_flops": work.flops,
        "floor_fraction": floors[bound] / ms,
    }


def matching(
    operator: str, batch: int, sources: Features, targets: Features, pairs: Sequence[tuple[int, int]], itemsize: int
) -> Work:
    """Of a matching operator over `pairs` of (source layer, target layer); all but features is float32."""
    features = batch * sum(map(math.prod, targets))
    projections = sum(sources[m][0] * (targets[n][0] + 1) for m, n in pairs)
    a = 4 * batch * sum(sources[m][0] for m, _ in pairs)
    direction = itemsize * features + 4 * projections
    inputs = direction + itemsize * batch * sum(map(math.prod, sources))
    moved = {
        "distances": inputs + a,
        "gradient": inputs + a + direction,
        "first step": inputs + direction + a,
        "adjoint": inputs + a + direction + direction + a,
    }[operator]
    unit = sum(2 * batch * sources[m][0] * math.prod(targets[n]) for m, n in pairs)
    return Work(moved, UNITS[operator] * unit)


@dataclass(frozen=True)
class _Passes:
    """The layers of a network that count."""

    forward: Work
    first: Work  # of the first layer alone: nothing needs the gradient of the images

    @property
    def step(self) -> Work:
        """Forward, gradient of the inputs, gradient of the weights."""
        return 3 * self.forward + -1 * self.first

    @property
    def first_adjoint(self) -> Work:
        """Of a step whose θ is a constant: the cotangent of what entered the backward pass."""
        return 2 * self.forward + -1 * self.first

    @property
    def adjoint(self) -> Work:
        return 6 * self.forward + -4 * self.first


def network(model: nn.Module, batch: int, size: int, itemsize: int) -> _Passes:
    """Counted without data."""
    works: list[Work] = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        moved = inputs[0].numel() + weight.numel() + output.numel()
        works.append(Work(itemsize * moved, 2 * output.numel() * weight[0].numel()))

    twin = copy.deepcopy(model).to("meta")
    for layer in twin.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        twin(torch.empty(batch, 3, size, size, device="meta"))
    return _Passes(sum(works, Work()), works[0])


class Floors:
    """Least work of the parts of an iteration of a case; `pairs` (source layer, target layer): all by default."""

    def __init__(self, case: Case, precision: str, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        itemsize = DTYPES[precision].itemsize
        sources, target = case.networks(torch.device("cpu"), torch.float32)
        self._case = case
        self._target = network(target, case.batch, case.size, itemsize)
        self.source = case.sources * network(sources[0], case.batch, case.size, itemsize).forward
        batch, S, T = case.shapes()
        self._pairs = [(m, n) for m in range(len(S)) for n in range(len(T))] if pairs is None else pairs
        self._matching = {operator: matching(operator, batch, S, T, self._pairs, itemsize) for operator in UNITS}
        # Images arrive as bytes and leave normalised.
        self.input = Work((1 + itemsize) * case.batch * 3 * case.size**2)

    @property
    def task_step(self) -> Work:
        """∇ L_org; also L_meta with its gradient."""
        return self._target.step

    @property
    def matching_step(self) -> Work:
        """∇ L_wfm, source features given."""
        return self._target.step + self._matching["gradient"]

    @property
    def task_adjoint(self) -> Work:
        """Of ∇ L_org, to θ."""
        return self._target.adjoint

    @property
    def matching_adjoint(self) -> Work:
        """Of ∇ L_wfm, to θ and a."""
        return self._target.adjoint + self._matching["adjoint"]

    @property
    def meta_gradient(self) -> Work:
        """T matching steps, one on L_org, L_meta, and the adjoints of all; source features given."""
        T = self._case.inner_steps
        if T == 0:  # L_meta does not depend on φ
            return Work()
        forward = T * self.matching_step + 2 * self.task_step
        first = self._target.first_adjoint + self._matching["first step"]
        return forward + self.task_adjoint + (T - 1) * self.matching_adjoint + first

    @property
    def iteration(self) -> Work:
        """The source pre-pass, the real step, the meta-gradient."""
        return self.real_iteration + self.meta_gradient

    @property
    def real_iteration(self) -> Work:
        """Of a method without meta-parameters: the real step, and the source pre-pass if there are pairs."""
        return self.source + self.task_step + self._matching["gradient"] if self._pairs else self.task_step
