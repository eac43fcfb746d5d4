"""Captured iterations. On a GPU they are CUDA graphs; without one a tape stands in for them.

The tape keeps what a CUDA graph keeps: operations on tensors at fixed places. All else that an iteration does, on the
host, happens once, while it is recorded; so a number that the host decides is frozen, and reading one is an error.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.engine import capture
from l2t_fast.engine.capture import WARM_UP, Graphs, Ring
from l2t_fast.networks.architectures import build_model
from tests.shared import CLASSES, batch, engine, everything, learner, same

pytestmark = pytest.mark.core

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class Tape(TorchDispatchMode):
    """A stand-in for `capture.CudaGraph`. While recording, what is computed must not be used by the host."""

    made: list["Tape"] = []  # noqa: RUF012

    def __init__(self, function: Callable[[], object], stream: Any, pool: Any) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        before = [p.clone() for p in self.changed()]
        with self:
            function()
        for tensor, old in zip(self.changed(), before, strict=True):
            tensor.copy_(old)  # recording runs on a CPU, capturing does not
        self.made.append(self)

    changed: Callable[[], list[Tensor]] = staticmethod(lambda: [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, f"the host reads what the device computes: {name}"
        result = func(*args, **(kwargs or {}))
        args, kwargs, outputs = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, tree_leaves(result)))
        self.operations.append((func, args, kwargs, [t for t in outputs if isinstance(t, Tensor)]))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(outputs, again, strict=True):
                if new.data_ptr() != old.data_ptr():  # neither a view nor in place
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Makes engines on the CPU in mode "graph", recorded on tapes."""
    monkeypatch.setattr(capture, "CudaGraph", Tape)
    Tape.made.clear()

    def make(**options: Any) -> Engine:
        taped = engine(**{"mode": "eager", **options})
        fuse(taped)
        taped.mode = "graph"

        def changed() -> list[Tensor]:
            state = taped.state_dict()
            adam = [t for moment in state["adam"].get("state", {}).values() for t in moment.values()]
            ring = taped._graphs._ring if taped._graphs is not None else None
            own = [] if ring is None else [ring._rows, ring._next]
            return [t for g in state.keys() - {"adam", "lr"} for t in state[g].values()] + adam + own

        def run(tensors: Any, like: Any) -> Any:
            monkeypatch.setattr(Tape, "changed", staticmethod(changed))
            return inner_run(tensors, like)

        def new_graphs() -> Graphs:
            nonlocal inner_run
            graphs = Graphs(taped._iterate, taped._device, taped._may_be_captured)
            inner_run = graphs.run
            graphs.run = run  # type: ignore[method-assign]
            return graphs

        inner_run: Any = None
        monkeypatch.setattr(taped, "_new_graphs", new_graphs)
        taped._graphs = new_graphs()
        return taped

    return make


def fuse(subject: Engine) -> Engine:
    """As on a GPU; on a CPU Adam's other forms read their step count."""
    if subject.trained.adam is not None:
        subject.trained.adam.param_groups[0]["fused"] = True
    return subject


def fused(**options: Any) -> Engine:
    return fuse(engine(**options))


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_replays_equal_launches(scheme: str, memory: str, taped: Callable[..., Engine]) -> None:
    """Bit by bit: over changes of the learning rates and a smaller last batch, which gets a graph of its own."""
    options = {"scheme": scheme, "memory": memory}
    eager, graph = fused(**options), taped(**options)
    for i in range(2 * (WARM_UP + 2)):
        eager.lr = graph.lr = 0.02 / (1 + i)
        for size in (4, 3):
            x, y = batch(i, size)
            expected, metrics = (e.step(x, y, val=batch(9, size)) for e in (eager, graph))
            same(metrics, expected)
    assert len(Tape.made) == 2
    same(everything(graph), everything(eager))
    same(graph.meta_gradient(*batch(0), val=batch(1)), eager.meta_gradient(*batch(0), val=batch(1)))


def test_replays_of_micro_batches_equal_launches(taped: Callable[..., Engine]) -> None:
    eager, graph = fused(accumulate=2), taped(accumulate=2)
    for i in range(WARM_UP + 2):
        same(graph.step(*batch(i)), eager.step(*batch(i)))
    assert len(Tape.made) == 1
    same(everything(graph), everything(eager))


def test_plain_training_is_captured_too(taped: Callable[..., Engine]) -> None:
    def plain() -> L2T:
        torch.manual_seed(0)
        network = build_model("vgg9_bn", CLASSES, 0.06).double()
        return L2T([], network, source_layers=[], target_layers=[], pairs=[], example=batch(0)[0])

    eager, graph = fused(subject=plain()), taped(subject=plain())
    for i in range(WARM_UP + 2):
        same(graph.step(*batch(i)), eager.step(*batch(i)))
    assert len(Tape.made) == 1
    same(eager.state_dict()["theta"], graph.state_dict()["theta"])


def test_two_engines_do_not_disturb_each_other(taped: Callable[..., Engine]) -> None:
    alone, first, second = fused(), taped(), taped(inner_steps=1)
    for i in range(WARM_UP + 3):
        expected = alone.step(*batch(i))
        metrics = first.step(*batch(i))
        second.step(*batch(50 + i))
        same(metrics, expected)
    same(everything(first), everything(alone))


def test_a_state_is_loaded_between_replays_and_across_modes(taped: Callable[..., Engine]) -> None:
    eager, graph = fused(), taped()
    for i in range(WARM_UP + 2):
        graph.step(*batch(i))
    eager.load_state_dict(graph.state_dict())
    fuse(eager)  # loading picks what the device has
    for i in range(WARM_UP + 2):
        same(graph.step(*batch(20 + i)), eager.step(*batch(20 + i)))
    other = fused()
    for i in range(2):
        other.step(*batch(40 + i))
    for e in (eager, graph):
        e.load_state_dict(other.state_dict())
        fuse(e)
    for i in range(WARM_UP + 2):
        same(graph.step(*batch(60 + i)), eager.step(*batch(60 + i)))
    same(everything(graph), everything(eager))


def test_metrics_outlive_later_replays(taped: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "ROWS", 5)
    graph = taped()
    steps = [graph.step(*batch(i)) for i in range(WARM_UP + 1)]
    kept = [{name: value.clone() for name, value in metrics.items()} for metrics in steps]
    steps.append(graph.step(*batch(20)))
    for metrics, expected in zip(steps[:-1], kept, strict=True):
        same(metrics, expected)
    graph.step(*batch(21))  # the sixth takes the place of the first
    assert steps[0]["loss"] != kept[0]["loss"]
    same(steps[1], kept[1])


def test_the_ring_keeps_shapes_and_order() -> None:
    metrics = {"loss": torch.tensor(1.0), "pair_weights": torch.tensor([2.0, 3.0])}
    ring = Ring(metrics)
    ring.write(metrics)
    first = ring.latest()
    ring.write({name: value + 10 for name, value in metrics.items()})
    second = ring.latest()
    assert first["loss"].shape == ()
    same(first, metrics)
    assert second["pair_weights"].tolist() == [12.0, 13.0]


def test_further_shapes_go_on_launch_by_launch(taped: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "GRAPHS", 1)
    eager, graph = fused(), taped()
    for i in range(WARM_UP + 2):
        for size in (4, 3):
            same(graph.step(*batch(i, size)), eager.step(*batch(i, size)))
    assert len(Tape.made) == 1


def failing(function: Any, stream: Any, pool: Any) -> None:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_what_cannot_be_captured_is_refused_and_nothing_changed(
    taped: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = taped()
    for i in range(WARM_UP):
        graph.step(*batch(i))
    before = everything(graph)
    monkeypatch.setattr(capture, "CudaGraph", failing)
    for _ in range(2):
        with pytest.raises(
            L2TError, match=r"cannot capture .*\(operation not permitted .*capturing\): use mode='auto'"
        ):
            graph.step(*batch(5))
        same(everything(graph), before)


def test_auto_falls_back_with_one_line(taped: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    eager, graph = fused(), taped(mode="auto", say=said.append)
    monkeypatch.setattr(capture, "CudaGraph", failing)
    said.clear()
    for i in range(WARM_UP + 3):
        same(graph.step(*batch(i)), eager.step(*batch(i)))
    assert len(said) == 1
    assert said[0].startswith("l2t_fast: the iteration cannot be captured (operation not permitted")
    assert graph.mode == "eager"
    same(everything(graph), everything(eager))


def test_random_numbers_of_the_host_are_not_captured(taped: Callable[..., Engine]) -> None:
    graph = taped(subject=learner(dropout=nn.Dropout(0.5)))
    for i in range(WARM_UP):
        graph.step(*batch(i))
    with pytest.raises(L2TError, match="draws random numbers on the CPU, which a CUDA graph would repeat"):
        graph.step(*batch(WARM_UP))
