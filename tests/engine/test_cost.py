"""What an iteration keeps in memory and how often it computes what."""

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from l2t_fast import Engine
from l2t_fast.engine import bilevel
from l2t_fast.engine import inner_step as inner
from tests.engine.shared import BATCH, Tensors, X, Y, assert_close, flops, small_batch, small_learner, small_net

pytestmark = pytest.mark.core


class LiveStorages(TorchDispatchMode):
    """Bytes of all storages made inside it that are still alive, whoever holds them, autograd included."""

    def __init__(self, *, track_peak: bool = False) -> None:
        super().__init__()
        self.track_peak = track_peak
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def live(self) -> int:
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = reference, storage.nbytes()
        if self.track_peak:
            self.peak = max(self.peak, self.live())
        return result


@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_recompute_holds_one_step_and_save_holds_all(scheme: bilevel.Scheme) -> None:
    peaks: dict[tuple[str, int], int] = {}
    gradients: dict[tuple[str, int], Tensors] = {}
    for memory, steps in itertools.product(("save", "recompute"), (2, 6)):
        engine = Engine(small_learner(), scheme=scheme, inner_steps=steps, memory=memory)  # type: ignore[arg-type]
        with LiveStorages(track_peak=True) as tracker:
            gradients[memory, steps] = engine.meta_gradient(*small_batch(1, 16), small_batch(2, 16))
        peaks[memory, steps] = tracker.peak
    start = 2 * sum(p.nbytes for p in inner.parameters(engine.learner).values()) + torch.get_rng_state().nbytes
    activations = BATCH * (5 * 8 * 8 + 4 * 4 * 4) * 8  # one feature map of each block
    assert peaks["recompute", 6] - peaks["recompute", 2] <= 4 * start  # θ, momentum and the generator before a step
    assert peaks["save", 6] - peaks["save", 2] >= 4 * 3 * activations  # conv, BatchNorm, ReLU
    for steps in (2, 6):
        assert_close(gradients["save", steps], gradients["recompute", steps], 1e-12)


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_memory_is_flat_over_200_iterations(memory: bilevel.Memory) -> None:
    engine = Engine(small_learner(pairs="single"), inner_steps=1, memory=memory)

    counts = []
    for i in range(1, 201):
        engine.step(X, Y)
        if i in (50, 200):
            gc.collect()
            counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert counts[0] == counts[1]
    with LiveStorages() as tracker:  # also what autograd alone holds
        live = [tracker.live() for _ in range(10) if engine.step(X, Y)]
    assert live[4] == live[9]


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_the_first_step_forms_no_hessian_product(scheme: bilevel.Scheme, memory: bilevel.Memory) -> None:
    """Against the same sweep with θ as a variable, which forms one for each step."""
    learner = small_learner(small_net(nn.Softplus()))
    engine = Engine(learner, scheme=scheme, inner_steps=1, memory=memory)
    x, y = small_batch(0, 8)
    S = learner.source_features(x)
    with torch.no_grad():
        a, _ = learner.coefficients(S, engine.beta)
    data = inner.StepInput(x, y, *learner.matching_sources(S, True), a)
    kinds = bilevel.simulated_steps(scheme, 1, 1)

    def step(kind: bilevel.Kind, theta: Tensors, coefficients: list[Tensor]) -> Tensors:
        g = inner.gradient(learner, theta, data._replace(a=coefficients), task=kind.task, matching=kind.matching).theta
        return {name: p - 0.1 * g.get(name, 0 * p) for name, p in theta.items()}

    def sweep(constant: bool) -> None:
        theta = {n: p.detach().requires_grad_(not constant) for n, p in inner.parameters(learner).items()}
        end, coefficients = theta, [p.clone().requires_grad_() for p in a]
        for kind in kinds:
            end = step(kind, end, coefficients)
        loss = inner.task_loss(learner, end, x, y)
        torch.autograd.grad(loss, coefficients if constant else [*coefficients, *theta.values()], allow_unused=True)

    sources = flops(lambda: learner.weights(learner.source_features(x)))
    heads = flops(lambda: learner.weights(S))  # their backward, to w and λ alone
    replay = flops(lambda: [step(kind, inner.parameters(learner), a) for kind in kinds])
    pruned, full = flops(lambda: sweep(True)), flops(lambda: sweep(False))
    assert pruned < full
    counted = flops(lambda: engine.meta_gradient(x, y, (x, y)))
    assert counted == pruned + sources + heads + (replay if memory == "recompute" else 0)


@contextmanager
def calls_of(name: str) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of every call of an operator torch.ops.l2t.*"""
    seen: list[tuple[Any, ...]] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name() == f"l2t::{name}":
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Spy():
        yield seen


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_an_iteration_runs_the_source_once_and_each_operator_once_a_step(memory: bilevel.Memory) -> None:
    learner = small_learner()
    engine = Engine(learner, inner_steps=3, memory=memory)
    runs: list[int] = []
    learner.sources[0].get_submodule("0.0").register_forward_hook(lambda *_: runs.append(1))
    with calls_of("matching_gradient") as gradients, calls_of("matching_adjoint") as adjoints:
        engine.step(*small_batch(0, 8))
    assert len(runs) == 1
    assert len(gradients) == 1 + 3 * (2 if memory == "recompute" else 1)
    assert [args[-1] for args in adjoints] == [True, True, False]  # the first step's, swept last, gives v_a alone
