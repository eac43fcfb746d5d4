"""The engine against the oracle, finite differences and torch.optim, in float64 on tiny networks."""

import copy
import gc
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.engine import bilevel
from l2t_fast.engine import inner_step as inner
from l2t_fast.kernels.layers import twins as layers
from l2t_fast.kernels.matching import ops
from l2t_fast.kernels.matching import triton_launch as triton_impl
from l2t_fast.kernels.sgd import step as sgd
from l2t_fast.kernels.sgd.step import SGD, sgd_step
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.layers import default_layers
from l2t_fast.reference import Reference

pytestmark = pytest.mark.core

CLASSES, BATCH = 3, 4
Batch = tuple[Tensor, Tensor]
Tensors = dict[str, Tensor]


def batch(seed: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


X, Y = batch(0, 8)


def block(c_in: int, c_out: int, stride: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), act)


def source_net(strides: tuple[int, int], channels: tuple[int, int] = (5, 6)) -> nn.Module:
    first, second = channels
    return nn.Sequential(block(3, first, strides[0], nn.ReLU()), block(first, second, strides[1], nn.ReLU())).double()


def small_net(act: nn.Module | None = None, middle: nn.Module | None = None) -> nn.Module:
    """Images [B, 3, 8, 8] or larger; layers "0" (half as high and wide) and "2" (a quarter)."""
    act = nn.ReLU(inplace=True) if act is None else act
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)]
    return nn.Sequential(block(3, 5, 2, act), middle or nn.Identity(), block(5, 4, 2, act), *head).double()


def small_learner(target: nn.Module | None = None, **options: Any) -> L2T:
    """One source of 4x4 and 2x2 features, a target of 4x4 and 2x2, 8x8 images."""
    torch.manual_seed(0)
    options = {"source_layers": ["0", "1"], "target_layers": ["0", "2"], **options}
    learner = L2T(source_net((2, 2)), target or small_net(), example=batch(0, 8)[0], **options)
    randomise(learner)
    return learner


def randomise(learner: L2T) -> None:
    """φ away from its start; some pair weights λ clipped from above or below."""
    with torch.no_grad():
        for p in (*learner.what.parameters(), *learner.where.parameters()):
            p.add_(0.3 * torch.randn_like(p))
        for head, level in zip(learner.where, (6.0, 0.0), strict=False):
            if isinstance(head, nn.Linear):
                head.bias.fill_(level)


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_close(actual: Tensors, expected: Tensors, relative: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    difference, size = (flat(actual) - flat(expected)).norm(), flat(expected).norm()
    assert difference <= relative * size, f"relative difference {difference / size:.1e}"


def everything(engine: Engine) -> dict[str, Any]:
    """Copies of all that an iteration might change."""
    learner = engine.learner
    state = engine.state_dict()
    return copy.deepcopy(
        {
            "parameters": dict(learner.named_parameters()),
            "grad": {name: p.grad for name, p in learner.named_parameters()},
            "buffers": dict(learner.named_buffers()),
            "training": [m.training for m in learner.modules()],
            "requires_grad": [p.requires_grad for p in learner.parameters()],
            "random": torch.get_rng_state(),
            "momentum": state["momentum"],
            "adam": state["adam"],
            "lr": engine.lr,
        }
    )


def assert_identical(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


ENGINE = {"lr", "momentum", "weight_decay", "nesterov", "meta_lr", "meta_weight_decay", "beta", "inner_steps", "scheme"}


def twins(
    target: nn.Module,
    target_layers: Sequence[str],
    *,
    two_sources: bool = True,
    size: int,
    memory: bilevel.Memory = "save",
    warm: int = 3,
    **options: Any,
) -> tuple[Engine, Reference]:
    """An engine and the oracle, in the same state, `warm` iterations after initialisation, with random φ.

    The first source has features a half and a quarter as high and wide as the image, the second 1 and an eighth.
    """
    torch.manual_seed(0)
    sources = [source_net((2, 2)), source_net((1, 8), (4, 3))][: 1 + two_sources]
    settings = {"lr": 0.05, "weight_decay": 1e-2, **{k: v for k, v in options.items() if k in ENGINE}}
    networks = {
        "source_layers": [["0", "1"]] * len(sources),
        "target_layers": target_layers,
        "example": batch(0, size)[0],
        **{k: v for k, v in options.items() if k not in ENGINE},
    }
    learner = L2T(sources, copy.deepcopy(target), **networks)
    randomise(learner)
    engine = Engine(learner, **settings, memory=memory)
    for seed in range(warm):
        engine.step(*batch(seed, size), val=batch(9, size))
    reference = Reference(copy.deepcopy(sources), target, **{**networks, "pairs": learner.pairs}, **settings)
    take_state(reference, copy.deepcopy(engine.state_dict()))
    return engine, reference


@torch.no_grad()
def take_state(reference: Reference, state: dict[str, Any]) -> None:
    for ours, theirs in ((reference.theta, state["theta"]), (reference.phi, state["phi"])):
        assert ours.keys() == theirs.keys()
        for name, p in ours.items():
            p.copy_(theirs[name])
    for name, buffer in reference.target.named_buffers():
        buffer.copy_(state["buffers"][name])
    for name, p in reference.theta.items():
        reference.optimizer.state[p]["momentum_buffer"] = state["momentum"][name]
    if reference.meta_optimizer is not None:
        reference.meta_optimizer.load_state_dict(state["adam"])


def resnet() -> tuple[nn.Module, list[str]]:
    """Features as high and wide as the image, a half and a quarter of that."""
    model = build_model("resnet8", CLASSES, width=0.25).double()
    return model, default_layers("resnet8", model)


def vgg() -> tuple[nn.Module, list[str]]:
    """Features of 32x32, 16x16, 8x8, 4x4 and 2x2."""
    model = build_model("vgg9_bn", CLASSES, width=0.06).double()
    return model, default_layers("vgg9_bn", model)


def frozen() -> tuple[nn.Module, list[str]]:
    model, layers = resnet()
    model.get_submodule("conv1").requires_grad_(False)
    model.get_submodule("layer2.0.bn1").requires_grad_(False)
    return model, layers


class Summed(nn.Module):
    """A convolution with the sum of two parameters, whose gradients are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(0.2 * torch.randn(5, 5, 3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a + self.b, padding=1)


def with_a_sum() -> tuple[nn.Module, list[str]]:
    return small_net(middle=Summed()), ["0", "2"]


def with_dropout() -> tuple[nn.Module, list[str]]:
    return small_net(middle=nn.Dropout(0.3)), ["0", "2"]


SGD_RULES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0, "memory": "recompute"},
    {"weight_decay": 0.0, "nesterov": True},
]
WHERE = ("relu6", "relu", "relu-avg", "softplus", "fixed")
CASES: list[tuple[Any, dict[str, Any]]] = [
    *(
        (net, {"scheme": scheme, "inner_steps": t, "memory": ("save", "recompute")[i % 2]})
        for i, (net, scheme, t) in enumerate(itertools.product((resnet, vgg), ("transfer", "simulation"), (0, 1, 2, 5)))
    ),
    *((resnet, {"scheme": scheme, **rule}) for scheme in ("transfer", "simulation") for rule in SGD_RULES),
    *((vgg, {"where": where, "two_sources": False, "memory": "recompute"}) for where in WHERE),
    (vgg, {"what": "uniform", "beta": 2.0}),
    (resnet, {"pairs": [(1, 1, 0), (0, 0, 2)], "what": "uniform", "where": "softplus"}),
    (resnet, {"pairs": "one-to-one", "scheme": "simulation", "batches": 1}),
    (resnet, {"pairs": "single", "inner_steps": 3, "val": True}),
    (with_a_sum, {"inner_steps": 3}),
    (frozen, {"memory": "recompute"}),
    (frozen, {"scheme": "simulation"}),
    *(
        (with_dropout, {"inner_steps": 3, "scheme": scheme, "memory": memory})
        for scheme in ("transfer", "simulation")
        for memory in ("save", "recompute")
    ),
]


def name_of(case: Any) -> str:
    return case.__name__ if callable(case) else "-".join(f"{k}={v}" for k, v in case.items())


@pytest.mark.parametrize(("net", "case"), CASES, ids=name_of)
def test_meta_gradient_equals_the_reference(net: Any, case: dict[str, Any]) -> None:
    options = {k: v for k, v in case.items() if k not in ("batches", "val")}
    torch.manual_seed(0)
    size = 32 if net is vgg else 16
    engine, reference = twins(*net(), **options, size=size)
    simulation, steps = engine.scheme == "simulation", engine.inner_steps
    x, y = batch(30, size)
    xs, ys = map(list, zip(*(batch(seed, size) for seed in range(30, 30 + max(steps, 1))), strict=True))
    several = simulation and case.get("batches") != 1
    arguments = (xs if several else x, ys if several else y, batch(40, size) if simulation or "val" in case else None)

    before = everything(engine)
    torch.manual_seed(1)
    expected = reference.meta_gradient(*arguments)
    torch.manual_seed(1)
    before["random"] = torch.get_rng_state()
    actual = engine.meta_gradient(*arguments)

    assert_close(actual, expected)
    assert (flat(actual).norm() > 1e-6) == (steps > 0)
    assert_identical(everything(engine), before)


@pytest.mark.parametrize("case", [{}, {"scheme": "simulation", "nesterov": True, "memory": "recompute"}], ids=name_of)
def test_meta_gradient_equals_finite_differences(case: dict[str, Any]) -> None:
    learner = small_learner(small_net(nn.Softplus()), where="softplus")
    engine = Engine(learner, weight_decay=1e-2, **case)
    train, val = batch(30, 8), batch(40, 8)
    for seed in range(2):
        engine.step(*batch(seed, 8), val=val)
    gradient = engine.meta_gradient(*train, val)
    phi = engine.state_dict()["phi"]
    start = {name: p.clone() for name, p in phi.items()}

    @torch.no_grad()
    def meta_loss(offset: Tensors) -> Tensor:
        """L_meta by the first-order rule alone, one step after the other."""
        for name, p in phi.items():
            p.copy_(start[name] + offset[name])
        S = learner.source_features(train[0])
        data = inner.Batch(*train, *learner.matching_sources(S, True), learner.cotangents(S, engine.beta)[0])
        theta = {name: p.detach() for name, p in inner.parameters(learner).items()}
        momentum = engine.state_dict()["momentum"]
        rule, lr = SGD(0.9, 1e-2, bool(case)), torch.tensor(engine.lr)
        kinds = [(True, True)] * 2 if case else [(False, True), (False, True), (True, False)]
        for task, matching in kinds:
            g = inner.gradient(learner, theta, data, task=task, matching=matching).theta
            new = sgd_step(list(theta.values()), list(momentum.values()), [g.get(name) for name in theta], lr, rule)
            theta, momentum = (dict(zip(theta, tensors, strict=True)) for tensors in new)
        return inner.task_loss(learner, theta, *val)

    torch.manual_seed(1)
    for _ in range(3):
        direction = {name: torch.randn_like(p) for name, p in phi.items()}
        h = 1e-3 / flat(direction).norm().item()
        near, far = (
            meta_loss({n: k * h * d for n, d in direction.items()})
            - meta_loss({n: -k * h * d for n, d in direction.items()})
            for k in (1, 2)
        )
        difference = (8 * near - far) / (12 * h)  # central, fourth order
        assert torch.isclose(flat(gradient) @ flat(direction), difference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("net", [resnet, with_dropout], ids=name_of)
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_three_steps_equal_those_of_the_reference(net: Any, scheme: str, memory: bilevel.Memory) -> None:
    torch.manual_seed(0)
    engine, reference = twins(
        *net(), scheme=scheme, memory=memory, two_sources=False, meta_lr=1e-3, nesterov=True, size=16
    )
    for i, lr in enumerate((0.05, 0.01, 0.02)):  # as a schedule does
        engine.lr = reference.optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(i)
        expected = reference.step(*batch(30 + i, 16), val=batch(40, 16))
        torch.manual_seed(i)
        metrics = engine.step(*batch(30 + i, 16), val=batch(40, 16))
        assert_close({k: metrics[k] for k in expected}, expected)
        state, theirs = engine.state_dict(), reference.state_dict()
        assert_close(state["theta"], {k: p.detach() for k, p in reference.theta.items()})
        assert_close(state["phi"], {k: p.detach() for k, p in reference.phi.items()})
        assert_close(state["momentum"], theirs["momentum"])
        assert_close(state["buffers"], dict(reference.target.named_buffers()))
        counts = [b.item() for name, b in state["buffers"].items() if name.endswith("num_batches_tracked")]
        assert counts == [3 + i + 1] * len(counts) != []


def test_the_networks_given_are_trained_in_place_and_the_sources_are_not() -> None:
    torch.manual_seed(0)
    source, target = source_net((2, 2)), small_net()
    before = [copy.deepcopy(network.state_dict()) for network in (source, target)]
    learner = L2T(source, target, source_layers=["1"], target_layers=["2"], example=batch(0, 8)[0])
    Engine(learner).step(*batch(0, 8))
    assert_identical(source.state_dict(), before[0])
    assert all(not torch.equal(p, before[1][name]) for name, p in target.state_dict().items())
    assert not any(m.training for m in source.modules())
    assert not any(p.requires_grad for p in source.parameters())


def test_meta_gradient_leaves_a_target_in_evaluation_mode_there() -> None:
    target = small_net()
    engine = Engine(small_learner(target))
    for training in (False, True):
        target.train(training)
        target[0].train(not training)  # type: ignore[index]
        modes = [m.training for m in target.modules()]
        engine.meta_gradient(*batch(0, 8))
        assert [m.training for m in target.modules()] == modes


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
            gradients[memory, steps] = engine.meta_gradient(*batch(1, 16), batch(2, 16))
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


def flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_the_first_step_forms_no_hessian_product(scheme: bilevel.Scheme, memory: bilevel.Memory) -> None:
    """Against the same sweep with θ as a variable, which forms one for each step."""
    learner = small_learner(small_net(nn.Softplus()))
    engine = Engine(learner, scheme=scheme, inner_steps=1, memory=memory)
    x, y = batch(0, 8)
    S = learner.source_features(x)
    with torch.no_grad():
        a, _ = learner.cotangents(S, engine.beta)
    data = inner.Batch(x, y, *learner.matching_sources(S, True), a)
    kinds = bilevel.simulated_steps(scheme, 1, 1)

    def step(kind: bilevel.Kind, theta: Tensors, weights: list[Tensor]) -> Tensors:
        g = inner.gradient(learner, theta, data._replace(a=weights), task=kind.task, matching=kind.matching).theta
        return {name: p - 0.1 * g.get(name, 0 * p) for name, p in theta.items()}

    def sweep(constant: bool) -> None:
        theta = {n: p.detach().requires_grad_(not constant) for n, p in inner.parameters(learner).items()}
        end, weights = theta, [p.clone().requires_grad_() for p in a]
        for kind in kinds:
            end = step(kind, end, weights)
        loss = inner.task_loss(learner, end, x, y)
        torch.autograd.grad(loss, weights if constant else [*weights, *theta.values()], allow_unused=True)

    sources = flops(lambda: learner.weights(learner.source_features(x)))
    heads = flops(lambda: learner.weights(S))  # their backward, to the weights alone
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
        engine.step(*batch(0, 8))
    assert len(runs) == 1
    assert len(gradients) == 1 + 3 * (2 if memory == "recompute" else 1)
    assert [args[-1] for args in adjoints] == [True, True, False]  # the first step's, swept last, gives v_a alone


@pytest.mark.parametrize("net", [resnet, with_dropout], ids=name_of)
@pytest.mark.parametrize("options", [{}, {"what": "uniform", "where": "fixed"}, {"scheme": "simulation"}], ids=name_of)
def test_a_loaded_state_goes_on_bit_exactly(net: Any, options: dict[str, Any]) -> None:
    def fresh(seed: int) -> Engine:
        torch.manual_seed(seed)
        target, layers = net()
        learner = L2T(
            source_net((2, 2)), target, source_layers=["0", "1"], target_layers=layers, example=batch(0, 16)[0],
            **{k: v for k, v in options.items() if k != "scheme"},
        )  # fmt: skip
        return Engine(learner, meta_lr=1e-2, scheme=options.get("scheme", "transfer"))

    def go_on(engine: Engine) -> list[Tensors]:
        torch.manual_seed(7)
        return [engine.step(*batch(i, 16), val=batch(9, 16)) for i in (10, 11)]

    torch.manual_seed(5)
    first = fresh(1)
    source = copy.deepcopy(first.learner.sources)
    for seed in range(2):
        first.step(*batch(seed, 16), val=batch(9, 16))
    first.lr = 0.03
    state = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(state)
    expected = go_on(first)
    end = copy.deepcopy(first.state_dict())

    for seed in (2, 3):  # twice from the same state, so it is not changed by what follows
        other = fresh(seed)
        other.learner.sources.load_state_dict(source.state_dict())
        other.step(*batch(20, 16), val=batch(9, 16))
        other.load_state_dict(state)
        assert_identical(other.state_dict(), kept)
        assert_identical(go_on(other), expected)
        assert_identical(other.state_dict(), end)
        assert_identical(state, kept)


def test_a_state_passes_through_a_file(tmp_path: Any) -> None:
    engine = Engine(small_learner())
    engine.step(*batch(0, 8))
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    expected = copy.deepcopy(engine.state_dict())
    engine.step(*batch(1, 8))
    engine.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_identical(engine.state_dict(), expected)


def test_a_foreign_state_is_refused_and_nothing_changed() -> None:
    engine = Engine(small_learner())
    engine.step(*batch(0, 8))
    other = copy.deepcopy(engine.state_dict())
    engine.step(*batch(1, 8))

    wide = copy.deepcopy(other)
    wide["phi"]["where.3.weight"] = torch.zeros(1, 99)
    states: list[Any] = [
        {},
        [other],
        {"state_dict": {}},
        wide,
        *({k: v for k, v in other.items() if k != key} for key in other),
        *({**other, key: {}} for key in ("theta", "momentum", "buffers", "phi", "adam")),
        {**other, "theta": dict.fromkeys(other["theta"], 1.0)},
        {**other, "adam": {"state": {}, "param_groups": []}},
        Engine(small_learner(pairs="single")).state_dict(),
        Engine(small_learner(what="uniform")).state_dict(),
    ]
    before = everything(engine)
    for state in states:
        with pytest.raises(L2TError, match=r"this (state does not fit the learner|is not the state of an engine)"):
            engine.load_state_dict(state)
        assert_identical(everything(engine), before)
    with pytest.raises(L2TError, match=r"'where.3.weight' is \[1, 99\], not \[1, 6\]"):
        engine.load_state_dict(wide)


@pytest.mark.parametrize("rule", [{"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}, {"momentum": 0.0}])
def test_without_pairs_it_is_plain_training(rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    target = small_net()
    plain = copy.deepcopy(target)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, weight_decay=1e-2, **rule)
    engine = Engine(small_learner(target, pairs=[]), lr=0.1, weight_decay=1e-2, **rule)
    for seed in range(3):
        x, y = batch(seed, 8)
        metrics = engine.step(x, y)
        logits = plain(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert metrics.keys() == {"loss", "accuracy"}
        assert torch.isclose(metrics["loss"], loss, rtol=1e-12)
        assert metrics["accuracy"] == (logits.argmax(1) == y).double().mean()
    assert_close(dict(target.named_parameters()), dict(plain.named_parameters()), 1e-12)
    assert_close(dict(target.named_buffers()), dict(plain.named_buffers()), 1e-12)


@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
@pytest.mark.parametrize("options", [{"what": "uniform", "where": "fixed"}, {"pairs": []}], ids=name_of)
def test_without_meta_parameters_there_is_no_meta_gradient(options: dict[str, Any], scheme: bilevel.Scheme) -> None:
    engine = Engine(small_learner(**options), scheme=scheme)
    x, y = batch(0, 8)
    assert engine.meta_gradient(x, y) == {}
    assert "meta_loss" not in engine.step(x, y)
    counted = flops(lambda: engine.step(x, y))
    target = flops(lambda: F.cross_entropy(engine.learner.target_outputs(x)[0], y).backward())
    learner = engine.learner
    sources = flops(lambda: learner.source_features(x)) if learner.pairs else 0
    product = flops(lambda: learner.matching_loss(x)) - flops(lambda: learner.target_outputs(x)) - sources  # r T
    assert counted == target + sources + 3 * product  # nothing is simulated


@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_metrics(scheme: bilevel.Scheme) -> None:
    learner = small_learner()
    engine = Engine(learner, beta=0.7, scheme=scheme)
    (x, y), val = batch(0, 8), batch(1, 8)
    before = copy.deepcopy(learner).train()  # a copied fx graph forgets the sources' evaluation mode
    logits = before.target_outputs(x)[0]
    metrics = engine.step(x, y, val)
    pairs = len(learner.pairs)
    assert {name: tuple(value.shape) for name, value in metrics.items()} == {
        **dict.fromkeys(("loss", "accuracy", "matching_loss", "meta_loss"), ()),
        **dict.fromkeys(("pair_losses", "pair_weights"), (pairs,)),
    }
    assert not any(value.requires_grad for value in metrics.values())
    assert torch.isclose(metrics["loss"], F.cross_entropy(logits, y), rtol=1e-12)
    assert metrics["accuracy"] == (logits.argmax(1) == y).double().mean()
    assert torch.isclose(metrics["matching_loss"], 0.7 * before.matching_loss(x), rtol=1e-12)
    w, lam = before.weights(before.source_features(x))
    assert torch.allclose(metrics["pair_weights"], torch.stack([weight.mean() for weight in lam]), rtol=1e-12)
    S, T = before.source_features(x), before.target_outputs(x)[1]
    for p, (_, m, n) in enumerate(learner.pairs):
        d = before.projections[p](T[n]) - F.interpolate(S[m], T[n].shape[2:], mode="bilinear")
        loss = 0.7 * (lam[p][:, None] * w[p] * d.square().mean((2, 3))).sum(1).mean()
        assert torch.isclose(metrics["pair_losses"][p], loss, rtol=1e-12)


def test_a_learning_rate_of_zero_leaves_theta_as_it_is() -> None:
    engine = Engine(small_learner(), lr=0.1)
    engine.lr = 0.0
    before = copy.deepcopy(engine.state_dict())
    engine.step(*batch(0, 8))
    assert_identical(engine.state_dict()["theta"], before["theta"])
    assert flat(engine.state_dict()["momentum"]).norm() > 0
    assert flat(engine.meta_gradient(*batch(0, 8))).norm() == 0  # no simulated step moves θ either


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "bilevel"}, r"scheme='bilevel' .*'transfer' or 'simulation'"),
        ({"mode": "fast"}, r"mode='fast' .*'auto' or 'eager'"),
        ({"precision": "fp8"}, r"precision='fp8' .*'fp32'"),
        ({"memory": "less"}, r"memory='less' .*'save' or 'recompute'"),
        ({"nesterov": True, "momentum": 0.0}, r"nesterov=True needs momentum > 0"),
        *(
            ({name: -1}, rf"{name}=-1 is not to be had")
            for name in ("lr", "momentum", "weight_decay", "meta_lr", "meta_weight_decay", "beta", "inner_steps")
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    learner = small_learner()
    with pytest.raises(L2TError, match=message):
        Engine(learner, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, Y + 1), r"labels go from \d to 3, but the target has classes 0 to 2"),
        ((X, 0 * Y - 1), r"labels go from -1 to"),
        ((X, Y, (X, Y + 3)), r"labels go from \d to \d, but"),
        ((X, Y[:-1]), r"labels must be int64 of shape \[4\] .*, not torch.int64 \[3\]"),
        ((X, F.one_hot(Y, 3)), r"of shape \[4\] .*, not torch.int64 \[4, 3\]"),
        ((X, Y.int()), r"labels must be int64 .*, not torch.int32 \[4\]"),
        ((X.float(), Y), r"the images are torch.float32 on cpu, the target is torch.float64 on cpu"),
        ((X.to("meta"), Y), r"the images are torch.float64 on meta, the target is torch.float64 on cpu"),
        ((X, Y.to("meta")), r"labels must be .* on cpu, .* on meta"),
        ((X[:1], Y[:1]), r"BatchNorm cannot train on a batch of one: give two"),
        ((X, Y, (X[:1], Y[:1])), r"BatchNorm cannot train on a batch of one"),
        ((X[:0], Y[:0]), r"empty"),
        (([X, X], [Y, Y]), r"scheme='transfer' takes one batch at a time"),
        (([X, X], [Y]), r"2 batches of images but 1 of labels"),
        (([], []), r"0 batches of images"),
    ],
)
def test_bad_batches(arguments: tuple[Any, ...], message: str) -> None:
    engine = Engine(small_learner())
    before = everything(engine)
    for function in (engine.step, engine.meta_gradient):
        with pytest.raises(L2TError, match=message):
            function(*arguments)
        assert_identical(everything(engine), before)


def test_simulation_needs_its_batches() -> None:
    engine = Engine(small_learner(), scheme="simulation", inner_steps=2)
    with pytest.raises(L2TError, match=r"give val=\(images, labels\)"):
        engine.step(X, Y)
    with pytest.raises(L2TError, match=r"3 batches for 2 inner steps"):
        engine.step([X] * 3, [Y] * 3, val=(X, Y))


@torch.no_grad()
def test_it_works_where_gradients_are_switched_off() -> None:
    engine = Engine(small_learner())
    with torch.enable_grad():
        expected = engine.meta_gradient(X, Y)
    assert_identical(engine.meta_gradient(X, Y), expected)
    assert engine.step(X, Y)["meta_loss"].isfinite()


def test_a_batch_of_one_is_fine_without_batchnorm() -> None:
    torch.manual_seed(0)
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    engine = Engine(small_learner(target.double(), target_layers=["1"]))
    assert engine.step(X[:1], Y[:1])["meta_loss"].isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "hardmax"}, r"what='hardmax' is unknown: use 'softmax' or 'uniform'"),
        ({"where": "relu7"}, r"where='relu7' is unknown: use 'relu6', 'relu', 'relu-avg', 'softplus' or 'fixed'"),
        ({"pairs": [(0, 2)]}, r"\(0, 0, 2\) .* no target layer 2"),
        ({"source_layers": ["0", "5"]}, r"the source 0 has no layer '5'"),
        ({"source_layers": [["0"], ["1"]]}, r"one list of names for each of the 1 sources"),
        ({"target_layers": ["0", "seven"]}, r"the target has no layer 'seven'"),
        ({"source_layers": []}, r"source 0|source_layers"),
        ({"target_layers": [], "pairs": "single"}, r"target|target_layers"),
        ({"example": X[0]}, r"example must be images \[B, C, H, W\], not a tensor of shape \[3, 8, 8\]"),
        ({"example": X.float()}, r"of the source 0 is torch.float64 on cpu, but example is torch.float32 on cpu"),
        ({"target": small_net().float()}, r"of the target is torch.float32 .*: move all networks"),
        ({"target": small_net().to("meta")}, r"of the target is torch.float64 on meta, but example is .* on cpu"),
        ({"sources": [source_net((2, 2)), source_net((2, 2))]}, r"one list of names for each of the 2 sources"),
        ({"sources": [source_net((2, 2)), source_net((1, 1)).float()], "source_layers": [["0"], ["0"]]},
         r"of the source 1 is torch.float32"),
    ],
)  # fmt: skip
def test_networks_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "sources": source_net((2, 2)), "target": small_net(), "source_layers": ["0", "1"], "target_layers": ["0", "2"],
        "example": X,
    }  # fmt: skip
    with pytest.raises(L2TError, match=message):
        L2T(**{**good, **options})


def test_nothing_to_train() -> None:
    learner = small_learner(small_net().requires_grad_(False))
    with pytest.raises(L2TError, match=r"the target has no parameter to train: set requires_grad"):
        Engine(learner)


def test_a_hardsigmoid_is_refused_before_anything_is_trained() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardsigmoid(), nn.Flatten(), nn.Linear(144, 3)).double()
    learner = L2T(small_net(nn.ReLU()), network, source_layers=["0"], target_layers=["0"], example=batch(0, 8)[0])
    with pytest.raises(L2TError, match="'1' of the target is a Hardsigmoid"):
        Engine(learner)


def test_one_network_as_source_and_target_is_refused() -> None:
    network = small_net(nn.ReLU())
    with pytest.raises(L2TError, match="share parameters: give the target a copy"):
        L2T(network, network, source_layers=["0"], target_layers=["0"], example=batch(0, 8)[0])


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    engine = Engine(small_learner(small_net(nn.ReLU())))
    engine.step(*batch(0, 8))
    state = copy.deepcopy(engine.state_dict())
    before = copy.deepcopy(engine.state_dict()["theta"])
    engine_state = engine.state_dict()
    for wrong in ({"lr": "x"}, {"adam": None}, {"adam": {**state["adam"], "state": {99: {}}}}):
        with pytest.raises(L2TError):
            engine.load_state_dict({**state, "theta": {n: p + 1 for n, p in before.items()}, **wrong})
        assert all(torch.equal(engine_state["theta"][name], p) for name, p in before.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter runs Triton in float64")
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_triton_kernels_change_nothing(memory: bilevel.Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators get the source features unresized, here of half and twice the target's resolution too."""

    def trained() -> tuple[Tensors, dict[str, Any]]:
        engine = Engine(small_learner(), memory=memory)
        engine.step(X, Y)
        return engine.meta_gradient(X, Y), everything(engine)

    theirs, after = trained()
    monkeypatch.setattr(ops, "implementation", lambda feature: triton_impl)
    monkeypatch.setattr(layers, "_fused", lambda x: True)
    monkeypatch.setattr(sgd, "_fused", lambda tensors: True)
    learner = small_learner()
    S = learner.source_features(X)
    assert not learner.resizes(X)
    assert [x.data_ptr() for x in learner.matching_sources(S, False)[0]] == [x.data_ptr() for x in S]
    ours, ours_after = trained()
    assert_close(ours, theirs)
    assert_close(ours_after["parameters"], after["parameters"])
