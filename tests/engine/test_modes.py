"""Modes and compiled steps on the CPU; `test_cuda.py` has what needs a GPU."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from l2t_fast import Engine, L2TError
from l2t_fast.engine import compile as compilation
from l2t_fast.engine.modes import Draws, choose_mode
from l2t_fast.kernels.matching import aten, ops
from tests.engine.shared import small_batch, small_learner, small_net
from tests.shared import batch, engine, error, everything, flat, learner

pytestmark = pytest.mark.core


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without a code generator: what Dynamo and AOTAutograd make of the functions."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    yield
    torch.compiler.reset()


def small(**options: Any) -> Engine:
    return engine(small_learner(), **options)


def assert_follows(compiled: Engine, eager: Engine, steps: int, tolerance: float = 1e-9) -> None:
    """Metrics, gradients and all that is trained, over changes of the learning rate and a smaller last batch."""
    for i in range(steps):
        compiled.lr = eager.lr = 0.02 / (1 + i)
        x, y = small_batch(i, 8)
        for size in (4, 3):
            expected, metrics = (e.step(x[:size], y[:size], val=small_batch(9, 8)) for e in (eager, compiled))
            assert error(metrics, expected) < tolerance
    arguments = (*small_batch(20, 8), small_batch(21, 8))
    assert error(compiled.meta_gradient(*arguments), eager.meta_gradient(*arguments)) < tolerance
    assert error(everything(compiled), everything(eager)) < tolerance


@pytest.mark.slow
def test_compiled_micro_batches_equal_eager_ones(aot_eager: None) -> None:
    compiled, eager = (small(mode=mode, accumulate=2) for mode in ("compile", "eager"))
    for i in range(2):
        expected, metrics = (e.step(*small_batch(i, 8)) for e in (eager, compiled))
        assert error(metrics, expected) < 1e-9
    assert compiled.mode == "compile"
    assert error(everything(compiled), everything(eager)) < 1e-9


@pytest.mark.parametrize(
    ("scheme", "memory"), [("transfer", "save"), ("transfer", "recompute"), ("simulation", "save")]
)
def test_compiled_steps_equal_eager_ones(scheme: Any, memory: Any, aot_eager: None) -> None:
    said: list[str] = []
    options = {"scheme": scheme, "memory": memory, "inner_steps": 3}
    compiled, eager = small(mode="compile", say=said.append, **options), small(mode="eager", **options)
    assert_follows(compiled, eager, steps=3)
    names = {
        "transfer": ["source features", "real step", "first matching step", "matching step", "task step", "meta loss"],
        "simulation": ["source features", "real step", "first simulated step", "simulated step", "meta loss"],
    }[scheme]
    lines = "".join(said).splitlines()
    assert [re.sub(r" \d+ s$", "", line) for line in lines] == [
        f"compiling {name} {i + 1}/{len(names)} ..." for i, name in enumerate(names)
    ]
    assert all(re.search(r"\.\.\. \d+ s$", line) for line in lines)


def test_dropout_is_drawn_alike(aot_eager: None) -> None:
    def steps(mode: Any) -> dict[str, torch.Tensor]:
        subject = engine(learner(dropout=nn.Dropout(0.5)), mode=mode, inner_steps=1, memory="recompute")
        for i in range(2):
            torch.manual_seed(i)
            subject.step(*batch(i))
        return everything(subject)

    expected = steps("eager")
    assert error(steps("compile"), expected) < 1e-9
    torch.manual_seed(5)
    assert error(steps("eager"), expected) == 0  # so that the seeds above decide


def test_switches_are_not_read_where_compilers_trace(aot_eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo cannot trace them; on CUDA the choice of the operators' implementation reads one."""

    def reads(feature: torch.Tensor) -> Any:
        assert torch.backends.cuda.matmul.fp32_precision in ("none", "ieee", "tf32")
        return aten

    monkeypatch.setattr(ops, "implementation", reads)
    compiled, eager = small(mode="compile"), small(mode="eager")
    expected, metrics = (e.step(*small_batch(0, 8)) for e in (eager, compiled))
    assert error(metrics, expected) < 1e-9


def test_compiled_bfloat16_equals_eager(aot_eager: None) -> None:
    def half(mode: Any) -> Engine:
        return engine(learner(torch.float32), mode=mode, precision="bf16", inner_steps=1)

    compiled, eager = half("compile"), half("eager")
    for i in range(2):
        expected, metrics = (e.step(*batch(i, 4, torch.float32)) for e in (eager, compiled))
        assert error(metrics, expected) < 1e-2


def test_the_cost_of_compiling_does_not_grow_with_the_steps(aot_eager: None) -> None:
    graphs = []
    for inner_steps in (2, 16):
        torch.compiler.reset()
        counters.clear()
        small(mode="compile", inner_steps=inner_steps).step(*small_batch(0, 8))
        graphs.append((counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]))
    assert graphs == [(6, 6)] * 2


@torch._dynamo.config.patch(recompile_limit=2)
def test_engines_share_neither_code_nor_limits(aot_eager: None) -> None:
    """More engines of different shapes than PyTorch recompiles one function for."""
    for size in (2, 3, 4):
        compiled, eager = (engine(small_learner(pairs="single"), mode=m, inner_steps=0) for m in ("compile", "eager"))
        x, y = small_batch(0, 8)
        expected, metrics = (e.step(x[:size], y[:size]) for e in (eager, compiled))
        assert error(metrics, expected) < 1e-9


def test_a_state_goes_from_mode_to_mode(aot_eager: None) -> None:
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)  # one of the user's is compiled with the steps
    compiled, eager = (small(mode=mode, loss=loss) for mode in ("compile", "eager"))
    for i in range(2):
        compiled.step(*small_batch(i, 8))
    eager.load_state_dict(copy.deepcopy(compiled.state_dict()))
    assert_follows(compiled, eager, steps=2)
    compiled.load_state_dict(copy.deepcopy(eager.state_dict()))
    assert_follows(compiled, eager, steps=1)


def failing(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no such instruction\nand more")


def test_what_cannot_be_compiled_is_refused_and_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", failing)
    compiled = small(mode="compile")
    before = everything(compiled)
    for _ in range(2):
        with pytest.raises(
            L2TError, match=r"cannot compile the source features .*no such instruction.*: use another mode"
        ):
            compiled.step(*small_batch(0, 8))
        assert error(everything(compiled), before) == 0
    torch.compiler.reset()


def test_auto_falls_back_from_compiling_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = small(mode="eager")
    monkeypatch.setattr(compilation, "BACKEND", failing)
    monkeypatch.setattr("l2t_fast.engine.engine.choose_mode", lambda *_: ("compile", "for this test"))
    said: list[str] = []
    fallen = small(mode="auto", say=said.append)
    assert said == ["l2t_fast: mode 'compile', for this test\n"]
    for i in range(2):
        expected, metrics = (e.step(*small_batch(i, 8)) for e in (eager, fallen))
        assert error(metrics, expected) == 0
    lines = "".join(said).splitlines()
    assert lines[1] == "compiling source features 1/6 ... failed"
    assert lines[2].startswith("l2t_fast: torch.compile cannot compile the source features")
    assert lines[2].endswith("Going on with mode 'eager'.")
    assert len(lines) == 3
    assert fallen.mode == "eager"
    torch.compiler.reset()


@pytest.mark.parametrize(("device", "mode"), [("cpu", "eager"), ("cuda", "graph")])
def test_auto(device: str, mode: str) -> None:
    assert choose_mode("auto", torch.device(device))[0] == mode


def test_what_auto_picked_is_said() -> None:
    said: list[str] = []
    picked = small(say=said.append)
    assert said == [f"l2t_fast: mode 'eager', {picked.why}\n"]
    assert picked.mode == "eager"
    said.clear()
    small(mode="eager", say=said.append)
    assert said == []


def test_a_graph_needs_cuda() -> None:
    with pytest.raises(L2TError, match="mode='graph' needs a CUDA device, but the target is on cpu: use mode='eager'"):
        small(mode="graph")


def test_fused_adam_takes_the_gradients_as_they_are() -> None:
    """It pairs elements by their place in memory: gradients must lie there as the parameters do."""
    usual, fused = small(), small()
    fused.trained.adam.param_groups[0]["fused"] = True  # type: ignore[union-attr]
    for i in range(3):
        x, y = small_batch(i, 8)
        assert all(g.stride() == fused.trained.phi[name].stride() for name, g in fused.meta_gradient(x, y).items())
        usual.step(x, y)
        fused.step(x, y)
    assert error(everything(fused), everything(usual)) < 1e-9


def test_a_loaded_learning_rate_stays_where_graphs_read_it() -> None:
    subject, other = small(), small(meta_lr=0.5)
    place = torch.tensor(1e-3)
    subject.trained.adam_options["lr"] = subject.trained.adam.param_groups[0]["lr"] = place  # type: ignore[union-attr]  # as on CUDA
    subject.step(*small_batch(0, 8))
    moments = [t for m in subject.trained.adam.state.values() for t in m.values()]  # type: ignore[union-attr]
    other.step(*small_batch(1, 8))
    subject.load_state_dict(other.state_dict())
    assert (place.item(), subject.meta_lr) == (0.5, 0.5)
    subject.meta_lr = 0.25
    assert place.item() == 0.25
    assert [id(t) for m in subject.trained.adam.state.values() for t in m.values()] == [id(t) for t in moments]  # type: ignore[union-attr]
    assert error(everything(subject), everything(other)) == 0


def test_numbers_that_the_host_draws_are_drawn_again_in_recompute() -> None:
    gradients = []
    for memory in ("save", "recompute"):
        subject = engine(learner(dropout=nn.Dropout(0.5)), memory=memory)
        subject._draws = Draws(host=True, device=False)
        torch.manual_seed(3)
        gradients.append(subject.meta_gradient(*batch(0)))
    assert error(*gradients) < 1e-9


def test_a_learning_rate_may_be_set_at_any_time() -> None:
    one, other = small(lr=0.5, meta_lr=0.5), small(lr=0.02, meta_lr=1e-3)
    one.lr, one.meta_lr = 0.02, 1e-3
    assert (one.lr, one.meta_lr) == (0.02, 1e-3)
    for i in range(2):
        one.step(*small_batch(i, 8))
        other.step(*small_batch(i, 8))
    assert flat(everything(one)).equal(flat(everything(other)))


def test_settings_changed_later_count_in_compiled_steps(aot_eager: None) -> None:
    compiled, eager = small(mode="compile"), small(mode="eager")
    for subject in (compiled, eager):
        subject.step(*small_batch(0, 8))
        subject.learner.target[0][1].eval()
    assert error(compiled.meta_gradient(*small_batch(1, 8)), eager.meta_gradient(*small_batch(1, 8))) < 1e-9
    assert_follows(compiled, eager, steps=1)


class Counting(nn.Module):
    """Halves what it gives from its twentieth pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return x if self.n < 20 else x / 2


def test_attributes_that_decide_are_not_compiled(aot_eager: None) -> None:
    compiled = engine(small_learner(small_net(middle=Counting())), mode="compile")
    with pytest.raises(L2TError, match=r"cannot be compiled: its forward pass sets attributes"):
        compiled.step(*small_batch(0, 8))
