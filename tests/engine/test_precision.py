"""fp32, tf32 and bf16 on the CPU: how exact they are, and the switches they set."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.engine.precision import arithmetic, warning
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.reference import Reference
from tests.engine.shared import small_learner, take_state
from tests.shared import batch, engine, error, learner, load_as

pytestmark = pytest.mark.core


def warmed_up(steps: int = 12) -> dict[str, Any]:
    """A state past the meta-gradient's early chaos (CONTRIBUTING.md), in float32."""
    subject = engine(learner(torch.float32, width=0.25), meta_lr=1e-2)
    for i in range(steps):
        subject.step(*batch(i % 8, 16, torch.float32))
    return copy.deepcopy(subject.state_dict())


def at(state: dict[str, Any], dtype: torch.dtype, device: str = "cpu", **options: Any) -> Engine:
    subject = engine(learner(dtype, device, width=0.25), **options)
    load_as(subject, state)
    return subject


def reference_at(state: dict[str, Any], device: str = "cpu") -> Reference:
    subject = at(state, torch.float32, device)
    torch.manual_seed(0)
    source, target = build_model("resnet8", 5, 0.25).to(device), build_model("vgg9_bn", 3, 0.25).to(device)
    layers: dict[str, Any] = {
        "source_layers": default_layers("resnet8", source),
        "target_layers": default_layers("vgg9_bn", target),
    }
    pairs = [tuple(pair) for pair in subject.learner.pairs]
    plain = Reference(source, target, pairs=pairs, example=batch(0, 2, torch.float32, device)[0], lr=0.02, **layers)
    take_state(plain, copy.deepcopy(subject.state_dict()))
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
    subject = learner(torch.float32)
    half = engine(subject, precision="bf16")
    seen: dict[str, list[torch.Tensor]] = {"Conv2d": [], "BatchNorm2d": [], "Linear": [], "BatchStatistics2d": []}
    for network in (subject.target, *subject.sources):
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
        subject = engine(learner(torch.float32, width=0.12), precision=precision, lr=0.05)
        losses[precision] = torch.stack([subject.step(*batch(0, 8, torch.float32))["loss"] for _ in range(12)])
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
    subject = L2T(Normalised(), Normalised(), source_layers=["act"], target_layers=["act"], example=x)
    exact = engine(copy.deepcopy(subject).double())
    half = engine(subject, precision="bf16")
    assert error(half.meta_gradient(x, y), exact.meta_gradient(x.double(), y)) < 0.1


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_low_precision_needs_float32_networks(precision: Any) -> None:
    with pytest.raises(
        L2TError, match=f"precision='{precision}' needs float32 networks, not torch.float64: use 'fp32'"
    ):
        engine(small_learner(), precision=precision)


def switches() -> list[Any]:
    """All of PyTorch's that an engine may touch."""
    backends: Any = torch.backends
    newer = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return [*(switch.fp32_precision for switch in newer), backends.cudnn.benchmark]


@pytest.mark.parametrize("users", ["nothing", "older", "newer", "newer for all", "newer for cuDNN"])
def test_switches_are_the_engines_own(users: str) -> None:
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


@pytest.mark.parametrize(
    ("has", "warned"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, None),
        ({"avx512_bf16": True}, "which has AVX512-BF16 without AMX"),
        ({"avx2": True}, "is not known to have instructions for it"),
    ],
    ids=["amx", "avx512", "none"],
)
def test_bf16_is_warned_of_on_a_cpu_without_amx(
    has: dict[str, bool], warned: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    told = warning("bf16", torch.device("cpu"))
    assert (told is None) if warned is None else (told is not None and warned in told)
    assert warning("fp32", torch.device("cpu")) is None
    assert warning("bf16", torch.device("cuda")) is None
    said: list[str] = []
    Engine(learner(torch.float32, width=0.12), precision="bf16", mode="eager", say=said.append)
    assert len(said) == (warned is not None)
