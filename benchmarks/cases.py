"""The cases: networks, layers and batch of the paper's experiments, and a learner, a reference and a batch of them."""

import argparse
import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import MatchingShapes
from l2t_fast import L2T, Engine
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.reference import Reference

MODULES = ("target", "projections", "what", "where")  # of a learner that are trained
State = dict[str, dict[str, Tensor]]  # of each

WARM_UP_BATCH = 8
WARM_UP = 24  # iterations after which the meta-gradient is no longer chaotic (CONTRIBUTING.md)


@dataclass(frozen=True)
class Case:
    """Source(s) and target, all pairs of their default layers, T simulated steps."""

    name: str
    source: str
    target: str
    source_classes: int
    classes: int
    size: int  # images are [batch, 3, size, size]
    batch: int
    sources: int = 1
    target_width: float = 1.0
    inner_steps: int = 2

    def networks(self, device: torch.device, dtype: torch.dtype) -> tuple[list[nn.Module], nn.Module]:
        """Random source networks and target, always the same ones.

        The sources normalise by statistics of random images, as trained ones do by those of theirs: with those of the
        start, features of a deep one grow until the matching loss of the first iterations diverges.
        """
        torch.manual_seed(0)
        sources = [build_model(self.source, self.source_classes) for _ in range(self.sources)]
        target = build_model(self.target, self.classes, self.target_width)
        for source in sources:
            _take_statistics(source, torch.randn(WARM_UP_BATCH, 3, self.size, self.size))
        return [network.to(device, dtype) for network in sources], target.to(device, dtype)

    def images(self, seed: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A batch: x [B, 3, H, W] and y [B]."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, 3, self.size, self.size, generator=generator, dtype=torch.float64)
        y = torch.randint(self.classes, (self.batch,), generator=generator)
        return x.to(device, dtype), y.to(device)

    def layers(self, sources: list[nn.Module], target: nn.Module) -> dict[str, Any]:
        """Their names, as `L2T` and `Reference` take them."""
        return {
            "source_layers": [default_layers(self.source, source) for source in sources],
            "target_layers": default_layers(self.target, target),
        }

    def learner(self, device: torch.device, dtype: torch.dtype, state: State | None = None) -> L2T:
        """A learner of its own networks, in `state` where there is one."""
        sources, target = self.networks(device, dtype)
        x, _ = replace(self, batch=2).images(0, device, dtype)
        learner = L2T(sources, target, example=x, **self.layers(sources, target))
        return learner if state is None else load(learner, state)

    def reference(self, device: torch.device, dtype: torch.dtype, state: State, **settings: Any) -> Reference:
        """The plain transcription of the paper, with the same networks and pairs; see `Reference` for `settings`."""
        sources, target = self.networks(device, dtype)
        layers = self.layers(sources, target)
        # All of them, in the learner's order.
        pairs = [
            (s, m, n)
            for s, names in enumerate(layers["source_layers"])
            for m in range(len(names))
            for n in range(len(layers["target_layers"]))
        ]
        x, _ = replace(self, batch=2).images(0, device, dtype)
        settings = {"inner_steps": self.inner_steps, **settings}
        reference = Reference(sources, target, pairs=pairs, example=x, **layers, **settings)
        return load(reference, state)

    def warm_state(self, device: torch.device) -> State:
        """The state after a few iterations, on small batches, from a fresh start."""
        return _warm_state(replace(self, batch=min(self.batch, WARM_UP_BATCH), inner_steps=1), device)

    def shapes(self) -> MatchingShapes:
        """Of the features, as the operators get them."""
        learner = self.learner(torch.device("cpu"), torch.float32)
        x, _ = replace(self, batch=1).images(0, torch.device("cpu"), torch.float32)
        with torch.no_grad():
            S, (_, T) = learner.source_features(x), learner.eval().target_outputs(x)
        return self.batch, [tuple(f.shape[1:]) for f in S], [tuple(f.shape[1:]) for f in T]


@torch.no_grad()
def _take_statistics(network: nn.Module, x: Tensor) -> None:
    """Puts the network's BatchNorms into evaluation mode with the statistics that they see of images x."""
    norms = [m for m in network.train().modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network(x)
    for norm in norms:
        norm.momentum = 0.1
    network.eval()


@functools.cache
def _warm_state(case: Case, device: torch.device) -> State:
    learner = case.learner(device, torch.float32)
    engine = Engine(learner, lr=0.05, inner_steps=case.inner_steps, mode="eager")
    for seed in range(WARM_UP):
        engine.step(*case.images(1000 + seed, device, torch.float32))
    return {name: copy.deepcopy(getattr(learner, name).state_dict()) for name in MODULES}


def load(learner: Any, state: State) -> Any:
    """Puts an `L2T` or a `Reference` into `state`."""
    for name in MODULES:
        getattr(learner, name).load_state_dict(state[name])
    return learner


CASES = {
    case.name: case
    for case in (
        Case("tiny", "resnet8", "vgg9_bn", 5, 5, size=32, batch=25, target_width=0.25),
        Case("cifar", "resnet32", "vgg9_bn", 200, 10, size=32, batch=128),
        Case("imagenet", "resnet34", "resnet18", 1000, 200, size=224, batch=64),
        Case("four-source", "resnet34", "resnet18", 1000, 200, size=224, batch=64, sources=4),
    )
}


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose cases, for `chosen_cases`."""
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["tiny", "cifar"], help="default: tiny cifar")
    parser.add_argument("--batch", type=int, help="images in a batch, instead of the case's own")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each contender (default 9)")


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases asked for."""
    found = [CASES[name] for name in arguments.cases]
    return found if arguments.batch is None else [replace(case, batch=arguments.batch) for case in found]
