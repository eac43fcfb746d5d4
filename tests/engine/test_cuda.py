"""What only a GPU can show: captured graphs, compiled kernels, precisions and streams."""

import copy
import gc
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from l2t_fast import SGD, AdamW, Engine
from l2t_fast.engine.capture import WARM_UP
from l2t_fast.learner.learner import L2T
from l2t_fast.methods import METHODS
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from tests.methods.shared import learner as of_method
from tests.shared import batch, engine, error, everything, learner, load_as

DEVICE = "cuda"
MODES = ["graph", "compile"]

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several runs alike, convolutions give the same bits."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def images(seed: int, size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return batch(seed, size, dtype, DEVICE)


def made(dtype: torch.dtype = torch.float32, dropout: nn.Module | None = None, **options: Any) -> Engine:
    return engine(learner(dtype, DEVICE, 0.25, dropout), **options)


@pytest.fixture(scope="module")
def warm() -> dict[str, Any]:
    """A state past the meta-gradient's early chaos (CONTRIBUTING.md)."""
    subject = made(mode="eager", meta_lr=1e-2)
    for i in range(24):
        subject.step(*images(i % 8))
    return copy.deepcopy(subject.state_dict())


def warmed(state: dict[str, Any], subject: Engine) -> Engine:
    """Captured, where it captures, and then in that state."""
    dtype = next(iter(subject.state_dict()["theta"].values())).dtype
    for i in range(WARM_UP + 2):
        subject.step(*images(i, dtype=dtype))
    adam = copy.deepcopy(subject.state_dict()["adam"])
    load_as(subject, {**state, "adam": adam})
    for moments in subject.trained.adam.state.values():  # type: ignore[union-attr]
        for tensor in moments.values():
            tensor.zero_()
    return subject


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("mode", MODES)
def test_float64_equals_eager(mode: Any, memory: Any, warm: dict[str, Any]) -> None:
    eager, other = (warmed(warm, made(torch.float64, mode=m, memory=memory)) for m in ("eager", mode))
    for i in range(3):
        eager.lr = other.lr = 0.01 / (1 + i)
        x, y = images(i, dtype=torch.float64)
        expected, metrics = (e.step(x, y) for e in (eager, other))
        assert error(metrics, expected) < 1e-9
    assert error(everything(other), everything(eager)) < 1e-9
    assert error(other.meta_gradient(x, y), eager.meta_gradient(x, y)) < 1e-9


@pytest.mark.parametrize("rule", [SGD(), AdamW()], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_optimizers_of_the_user_equal_eager(mode: Any, rule: Any) -> None:
    """With groups, clipping, a schedule and soft labels."""
    engines = []
    for m in ("eager", mode):
        subject = learner(torch.float64, DEVICE, 0.25)
        groups = [{"params": subject.projections.parameters(), "lr": 1e-3, "weight_decay": 0.0}]
        options: dict[str, Any] = {"optimizer": rule, "groups": groups, "max_grad_norm": 1.0, "lr": 2e-3}
        engines.append(engine(subject, mode=m, loss=nn.CrossEntropyLoss(label_smoothing=0.1), **options))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(e.optimizer, 0.9) for e in engines]
    for i in range(WARM_UP + 3):
        x, y = images(i, dtype=torch.float64)
        soft = 0.7 * nn.functional.one_hot(y, 3).double() + 0.1
        expected, metrics = (e.step(x, soft) for e in engines)
        assert error(metrics, expected) < 1e-6
        for schedule in schedules:
            schedule.step()


@pytest.mark.parametrize("mode", MODES)
def test_a_smaller_last_batch_is_the_same(mode: Any) -> None:
    eager, other = (made(torch.float64, mode=m) for m in ("eager", mode))
    for i in range(WARM_UP + 2):
        for size in (16, 7):
            x, y = images(i, size, torch.float64)
            expected, metrics = (e.step(x, y) for e in (eager, other))
            assert error(metrics, expected) < 1e-6


def test_a_hundred_replays_equal_a_hundred_launched_iterations(warm: dict[str, Any]) -> None:
    eager, graph = (warmed(warm, made(mode=m)) for m in ("eager", "graph"))
    for i in range(100):
        expected, metrics = (e.step(*images(i % 8)) for e in (eager, graph))
    assert error(metrics, expected) < 5e-6
    assert error(everything(graph), everything(eager)) < 5e-6


def test_two_engines_do_not_disturb_each_other(warm: dict[str, Any]) -> None:
    alone, first = (warmed(warm, made(mode="graph")) for _ in range(2))
    second = made(mode="graph", precision="bf16")
    for i in range(20):
        expected, metrics = alone.step(*images(i)), first.step(*images(i))
        second.step(*images(50 + i))
        assert error(metrics, expected) < 5e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_step_never_waits_and_is_one_launch(mode: Any) -> None:
    subject = made(mode=mode)
    x, y = images(0)
    hosts = [tensor.cpu().pin_memory() for tensor in (x, y)]
    for _ in range(WARM_UP + 2):
        subject.step(*hosts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(5):
                subject.lr = 0.01
                subject.step(x, y)
                subject.step(*hosts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [event.name for event in profiled.events()]
    assert names.count("cudaGraphLaunch") == 10
    assert not [n for n in names if "Synchronize" in n and "Device" not in n]  # the profiler's own is of the device
    assert (
        sum(n in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx") for n in names) < 40
    )


def test_learning_rates_change_under_a_graph() -> None:
    subject = made(mode="graph")
    for i in range(WARM_UP + 2):
        subject.step(*images(i))
    subject.lr = subject.meta_lr = 0.0
    before = everything(subject)
    subject.step(*images(0))
    after = everything(subject)
    for name in before:
        if name.startswith(("theta", "phi")):
            assert torch.equal(after[name], before[name]), name
    subject.lr, subject.meta_lr = 0.02, 1e-3
    subject.step(*images(0))
    assert error(everything(subject), after) > 1e-4


def test_a_loaded_learning_rate_reaches_the_graph(warm: dict[str, Any]) -> None:
    graph, eager = (warmed(warm, made(mode=m)) for m in ("graph", "eager"))
    for subject in (graph, eager):
        subject.load_state_dict(copy.deepcopy(subject.state_dict()))
        subject.meta_lr = 0.1
        subject.step(*images(0))
    assert error(everything(graph), everything(eager)) < 5e-6


class Waits(nn.Module):
    """Reads back what the device computes, which a capture must not."""

    def forward(self, x: Tensor) -> Tensor:
        return x * waiting(x)


@torch.fx.wrap
def waiting(x: Tensor) -> float:
    return 1.0 if x.detach().isfinite().all().item() else 0.0


def test_a_target_that_waits_is_not_captured_and_goes_on() -> None:
    said: list[str] = []
    waits = made(dropout=Waits(), mode="auto", say=said.append)
    eager = made(dropout=Waits(), mode="eager")
    for i in range(WARM_UP + 4):
        expected, metrics = (e.step(*images(i)) for e in (eager, waits))
    assert error(metrics, expected) < 1e-3
    assert waits.mode == "eager"
    assert "cannot be captured" in said[-1]
    assert "previous error" not in said[-1]
    other = made(mode="graph")  # what follows is captured all the same
    for i in range(WARM_UP + 2):
        other.step(*images(i))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_anew_in_each_replay(mode: Any) -> None:
    subject = made(mode=mode, dropout=nn.Dropout(0.5), lr=0.0, meta_lr=0.0)
    x, y = images(0)
    losses = [subject.step(x, y)["loss"].item() for _ in range(WARM_UP + 20)][WARM_UP:]
    assert len(set(losses)) == len(losses)
    eager = made(mode="eager", dropout=nn.Dropout(0.5), lr=0.0, meta_lr=0.0)
    theirs = [eager.step(x, y)["loss"].item() for _ in range(20)]
    spread = statistics.stdev(losses + theirs)
    assert abs(statistics.mean(losses) - statistics.mean(theirs)) < 2 * spread


@pytest.mark.parametrize("memory", ["pinned", "pageable", "labels on the host"])
def test_batches_from_the_host_are_the_same(memory: str, warm: dict[str, Any]) -> None:
    device, host = (warmed(warm, made(mode="graph")) for _ in range(2))
    for i in range(10):
        x, y = images(i)
        theirs = {
            "pinned": lambda x=x, y=y: (x.cpu().pin_memory(), y.cpu().pin_memory()),
            "pageable": lambda x=x, y=y: (x.cpu(), y.cpu()),
            "labels on the host": lambda x=x, y=y: (x, y.cpu()),
        }[memory]()
        assert error(host.step(*theirs), device.step(x, y)) < 5e-6


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("mode", ["eager", *MODES])
def test_low_precision_is_as_exact_as_pytorchs_own(mode: Any, precision: Any, warm: dict[str, Any]) -> None:
    """Against float64, over several batches; PyTorch's own is the plain transcription, in TF32 or under autocast."""
    from tests.engine.test_precision import reference_at

    exact = made(torch.float64, mode="eager")
    load_as(exact, {**warm, "adam": exact.state_dict()["adam"]})
    ours = warmed(warm, made(mode=mode, precision=precision))
    plain = reference_at(warm, DEVICE)
    eager = warmed(warm, made(mode="eager", precision=precision))
    ours_errors, eager_errors, plain_errors = [], [], []
    for seed in range(21):
        x, y = images(seed)
        wanted = exact.meta_gradient(x.double(), y)
        ours_errors.append(error(ours.meta_gradient(x, y), wanted))
        eager_errors.append(error(eager.meta_gradient(x, y), wanted))
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                plain_errors.append(error(plain.meta_gradient(x, y), wanted))
        finally:
            torch.set_float32_matmul_precision("highest")
    assert statistics.median(ours_errors) <= 1.2 * statistics.median(plain_errors)
    expected, metrics = (e.step(*images(0)) for e in (eager, ours))  # here graphs replay
    assert error(metrics, expected) < 10 * max(eager_errors)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_recompute_holds_one_step_whatever_the_number_of_steps(mode: Any) -> None:
    def peak(inner_steps: int) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.manual_seed(0)
        source, target = build_model("resnet32", 200).to(DEVICE), build_model("vgg9_bn", 10).to(DEVICE)
        x, y = torch.randn(128, 3, 32, 32, device=DEVICE), torch.randint(10, (128,), device=DEVICE)
        subject = engine(
            L2T(
                source,
                target,
                source_layers=default_layers("resnet32", source),
                target_layers=default_layers("vgg9_bn", target),
                example=x,
            ),
            mode=mode,
            memory="recompute",
            inner_steps=inner_steps,
        )
        for _ in range(WARM_UP + 2):
            subject.step(x, y)
        parameters = sum(p.numel() * p.element_size() for p in subject.trained.theta.values())
        held = torch.cuda.memory_reserved() - before - inner_steps * parameters  # θ where each step starts
        del subject, source, target
        gc.collect()  # an engine and its graphs refer to each other
        torch.cuda.empty_cache()
        return held

    assert peak(64) < 1.3 * peak(2)


def test_a_run_resumes_in_another_mode(warm: dict[str, Any]) -> None:
    graph, eager = warmed(warm, made(mode="graph")), warmed(warm, made(mode="eager"))
    for i in range(3):
        graph.step(*images(i))
    eager.load_state_dict(copy.deepcopy(graph.state_dict()))
    for i in range(3):
        assert error(graph.step(*images(10 + i)), eager.step(*images(10 + i))) < 5e-6
    graph.load_state_dict(copy.deepcopy(eager.state_dict()))
    assert error(graph.step(*images(20)), eager.step(*images(20))) < 5e-6


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_captured(name: str, precision: Any) -> None:
    """Replays follow launches, past the first steps."""
    assert_method_follows(name, "graph", precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["lwf+at", "jacobian"])
def test_terms_are_compiled(name: str, precision: Any) -> None:
    assert_method_follows(name, "compile", precision)


def assert_method_follows(name: str, mode: Any, precision: Any) -> None:
    options = {"precision": precision}
    eager, other = (
        engine(of_method(name, dtype=torch.float32, device=DEVICE), mode=m, **options) for m in ("eager", mode)
    )
    tolerance = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 0.1}[precision]
    for i in range(WARM_UP + 3):
        expected, metrics = (e.step(*images(i, 8)) for e in (eager, other))
        assert metrics.keys() == expected.keys()
        assert abs(metrics["loss"] - expected["loss"]) < tolerance * expected["loss"]
        for key in metrics.keys() & {"lwf_loss", "at_loss", "jacobian_loss", "matching_loss"}:
            assert abs(metrics[key] - expected[key]) < tolerance * expected[key]
    assert other._graphs is not None
    assert other.mode == mode
