"""Modes, precisions and compiled functions on the CPU; `test_cuda.py` has what needs a GPU."""

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.engine import compile as functions
from l2t_fast.engine.modes import Draws, choose_mode
from l2t_fast.engine.precision import arithmetic
from l2t_fast.kernels.matching import aten, ops
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.reference import Reference
from tests.engine.shared import small_batch, small_learner, take_state
from tests.shared import batch, engine, error, everything, flat, learner, load_as

pytestmark = pytest.mark.core


@pytest.fixture
def aot_eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without a code generator: what Dynamo and AOTAutograd make of the functions."""
    monkeypatch.setattr(functions, "BACKEND", "aot_eager")
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
        of = engine(learner(dropout=nn.Dropout(0.5)), mode=mode, inner_steps=1, memory="recompute")
        for i in range(2):
            torch.manual_seed(i)
            of.step(*batch(i))
        return everything(of)

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
    compiled, eager = small(mode="compile"), small(mode="eager")
    for i in range(2):
        compiled.step(*small_batch(i, 8))
    eager.load_state_dict(copy.deepcopy(compiled.state_dict()))
    assert_follows(compiled, eager, steps=2)
    compiled.load_state_dict(copy.deepcopy(eager.state_dict()))
    assert_follows(compiled, eager, steps=1)


def failing(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no such instruction\nand more")


def test_what_cannot_be_compiled_is_refused_and_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "BACKEND", failing)
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
    monkeypatch.setattr(functions, "BACKEND", failing)
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


@pytest.mark.parametrize(
    ("device", "iterations", "mode"),
    [
        ("cpu", None, "eager"),
        ("cpu", 10**6, "eager"),
        ("cuda", None, "graph"),
        ("cuda", 1000, "graph"),
        ("cuda", 10**6, "compile"),
    ],
)
def test_auto(device: str, iterations: int | None, mode: str) -> None:
    assert choose_mode("auto", torch.device(device), iterations)[0] == mode


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


# Precision


def warmed_up(steps: int = 12) -> dict[str, Any]:
    """A state past the meta-gradient's early chaos (CONTRIBUTING.md), in float32."""
    of = engine(learner(torch.float32, width=0.25), meta_lr=1e-2)
    for i in range(steps):
        of.step(*batch(i % 8, 16, torch.float32))
    return copy.deepcopy(of.state_dict())


def at(state: dict[str, Any], dtype: torch.dtype, device: str = "cpu", **options: Any) -> Engine:
    of = engine(learner(dtype, device, width=0.25), **options)
    load_as(of, state)
    return of


def reference_at(state: dict[str, Any], device: str = "cpu") -> Reference:
    of = at(state, torch.float32, device)
    torch.manual_seed(0)
    source, target = build_model("resnet8", 5, 0.25).to(device), build_model("vgg9_bn", 3, 0.25).to(device)
    layers: dict[str, Any] = {
        "source_layers": default_layers("resnet8", source),
        "target_layers": default_layers("vgg9_bn", target),
    }
    pairs = [tuple(pair) for pair in of.learner.pairs]
    plain = Reference(source, target, pairs=pairs, example=batch(0, 2, torch.float32, device)[0], lr=0.02, **layers)
    take_state(plain, copy.deepcopy(of.state_dict()))
    return plain


def test_bfloat16_is_as_exact_as_pytorchs_own() -> None:
    """Over several batches, against float64; PyTorch's own is the plain transcription under autocast."""
    state = warmed_up()
    exact, ours, plain = at(state, torch.float64), at(state, torch.float32, precision="bf16"), reference_at(state)
    ours_errors, plain_errors = [], []
    for seed in range(5):
        x, y = batch(seed, 16, torch.float32)
        wanted = exact.meta_gradient(x.double(), y)
        with torch.autocast("cpu", torch.bfloat16):
            plain_errors.append(error(plain.meta_gradient(x, y), wanted))
        ours_errors.append(error(ours.meta_gradient(x, y), wanted))
    assert torch.tensor(ours_errors).median() > 1e-3  # it is bfloat16
    assert torch.tensor(ours_errors).median() < torch.tensor(plain_errors).median()


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_float32_is_exact_to_its_rounding(precision: Any) -> None:
    """On a CPU, which has no TF32, that is float32 laid out as channels_last."""
    state = warmed_up(steps=24)
    exact, ours = at(state, torch.float64), at(state, torch.float32, precision=precision)
    errors = []
    for seed in range(21):  # kinks of ReLU and max-pool flip in some of them
        x, y = batch(seed, 16, torch.float32)
        errors.append(error(ours.meta_gradient(x, y), exact.meta_gradient(x.double(), y)))
    assert torch.tensor(errors).median() < 5e-6


def test_bfloat16_reaches_the_layers_and_nothing_else() -> None:
    of = learner(torch.float32)
    half = engine(of, precision="bf16")
    seen: dict[str, list[torch.Tensor]] = {"Conv2d": [], "BatchNorm2d": [], "Linear": [], "BatchStatistics2d": []}
    for network in (of.target, *of.sources):
        for module in network.modules():
            if type(module).__name__ in seen:
                name = type(module).__name__
                module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0]))
    metrics = half.step(*batch(0, 4, torch.float32))
    for name in ("Conv2d", "BatchNorm2d", "Linear"):
        assert seen[name]
        assert {x.dtype for x in seen[name]} == {torch.bfloat16}, name
    images = [x for name in ("Conv2d", "BatchNorm2d") for x in seen[name] if x.dim() == 4 and x.shape[1] > 1]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in images)
    kept = half.state_dict()
    wide = [t for group in ("theta", "momentum", "buffers", "phi") for t in kept[group].values()]
    assert {t.dtype for t in wide if t.is_floating_point()} == {torch.float32}
    assert {value.dtype for value in metrics.values()} == {torch.float32}


def test_bfloat16_trains_like_float32() -> None:
    """One batch over and over: it is learned, at about the same pace."""
    losses = {}
    for precision in ("fp32", "bf16"):
        of = engine(learner(torch.float32, width=0.12), precision=precision, lr=0.05)
        losses[precision] = torch.stack([of.step(*batch(0, 8, torch.float32))["loss"] for _ in range(12)])
    assert losses["fp32"][-1] < 0.5 * losses["fp32"][0]
    assert (losses["bf16"] - losses["fp32"]).abs().max() < 0.1 * losses["fp32"][0]


def test_mixed_networks_are_cast_where_it_matters() -> None:
    """A sum with a float32 buffer makes features wide again; GroupNorm and Linear go along."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
            self.act, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.flatten(self.pool(self.act(self.norm(self.conv(x - self.mean)))), 1))

    torch.manual_seed(0)
    x, y = batch(0, 4, torch.float32)
    of = L2T(Normalised(), Normalised(), source_layers=["act"], target_layers=["act"], example=x)
    exact = engine(copy.deepcopy(of).double())
    half = engine(of, precision="bf16")
    assert error(half.meta_gradient(x, y), exact.meta_gradient(x.double(), y)) < 0.1


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_low_precision_needs_float32_networks(precision: Any) -> None:
    with pytest.raises(
        L2TError, match=f"precision='{precision}' needs float32 networks, not torch.float64: use 'fp32'"
    ):
        small(precision=precision)


def switches() -> list[Any]:
    """All of PyTorch's that an engine may touch."""
    backends: Any = torch.backends
    newer = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return [*(switch.fp32_precision for switch in newer), backends.cudnn.benchmark]


@pytest.fixture
def restored() -> Iterator[None]:
    """PyTorch's switches after the test as before it."""
    backends: Any = torch.backends
    newer = [
        backends,
        backends.cudnn,
        backends.cuda.matmul,
        backends.mkldnn.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
    ]
    before = [switch.fp32_precision for switch in newer]
    yield
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for switch, value in zip(newer, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("users", ["nothing", "older", "newer", "newer for all", "newer for cuDNN"])
def test_switches_are_the_engines_own(users: str, restored: None) -> None:
    cuda, backends = torch.device("cuda"), torch.backends
    if users == "older":
        torch.set_float32_matmul_precision("high")
    elif users == "newer":
        backends.cuda.matmul.fp32_precision = "tf32"
        backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    elif users == "newer for all":
        backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    elif users == "newer for cuDNN":
        backends.cudnn.fp32_precision = "tf32"  # type: ignore[attr-defined]
    before = switches()
    for precision, wanted in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")):
        with arithmetic(precision, cuda):  # type: ignore[arg-type]
            inside = switches()
            assert (inside[0], inside[2], inside[4]) == (wanted, wanted, True)
            assert torch.get_float32_matmul_precision() == ("high" if wanted == "tf32" else "highest")
            assert backends.cudnn.allow_tf32 == (wanted == "tf32")  # the older ones can be read
            with arithmetic("tf32", cuda):
                pass
            assert switches() == inside
        assert switches() == before
    with arithmetic("tf32", torch.device("cpu")):
        assert switches() == before
    with contextlib.suppress(ZeroDivisionError), arithmetic("tf32", cuda):
        raise ZeroDivisionError
    assert switches() == before


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
    of, other = small(), small(meta_lr=0.5)
    place = torch.tensor(1e-3)
    of.trained.adam_options["lr"] = of.trained.adam.param_groups[0]["lr"] = place  # type: ignore[union-attr]  # as on CUDA
    of.step(*small_batch(0, 8))
    moments = [t for m in of.trained.adam.state.values() for t in m.values()]  # type: ignore[union-attr]
    other.step(*small_batch(1, 8))
    of.load_state_dict(other.state_dict())
    assert (place.item(), of.meta_lr) == (0.5, 0.5)
    of.meta_lr = 0.25
    assert place.item() == 0.25
    assert [id(t) for m in of.trained.adam.state.values() for t in m.values()] == [id(t) for t in moments]  # type: ignore[union-attr]
    assert error(everything(of), everything(other)) == 0


def test_numbers_that_the_host_draws_are_drawn_again_in_recompute() -> None:
    gradients = []
    for memory in ("save", "recompute"):
        of = engine(learner(dropout=nn.Dropout(0.5)), memory=memory)
        of._draws = Draws(host=True, device=False)
        torch.manual_seed(3)
        gradients.append(of.meta_gradient(*batch(0)))
    assert error(*gradients) < 1e-9


def test_a_learning_rate_may_be_set_at_any_time() -> None:
    one, other = small(lr=0.5, meta_lr=0.5), small(lr=0.02, meta_lr=1e-3)
    one.lr, one.meta_lr = 0.02, 1e-3
    assert (one.lr, one.meta_lr) == (0.02, 1e-3)
    for i in range(2):
        one.step(*small_batch(i, 8))
        other.step(*small_batch(i, 8))
    assert flat(everything(one)).equal(flat(everything(other)))
