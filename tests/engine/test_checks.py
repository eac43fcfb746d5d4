"""Settings, batches and networks that are refused, each with a sentence."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.reference import Reference
from tests.engine.shared import (
    CLASSES,
    X,
    Y,
    assert_close,
    assert_identical,
    beside_the_reference,
    flat,
    randomise,
    small_batch,
    small_learner,
    small_net,
    snapshot,
    source_net,
    take_state,
)

pytestmark = pytest.mark.core


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
        ({"lr": float("inf")}, r"lr=inf is not to be had: give a number from 0 to 1e\+06"),
        ({"meta_lr": 1e9}, r"meta_lr=1000000000.0 is not to be had"),
        ({"beta": float("nan")}, r"beta=nan is not to be had"),
        ({"inner_steps": 2.0}, r"inner_steps=2.0 is not to be had: give a whole number"),
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
    before = snapshot(engine)
    for function in (engine.step, engine.meta_gradient):
        with pytest.raises(L2TError, match=message):
            function(*arguments)
        assert_identical(snapshot(engine), before)


def test_simulation_needs_its_batches() -> None:
    engine = Engine(small_learner(), scheme="simulation", inner_steps=2)
    with pytest.raises(L2TError, match=r"give val=\(images, labels\)"):
        engine.step(X, Y)
    with pytest.raises(L2TError, match=r"3 batches for 2 inner steps"):
        engine.step([X] * 3, [Y] * 3, val=(X, Y))


def test_a_batch_of_one_is_fine_without_batchnorm() -> None:
    torch.manual_seed(0)
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    engine = Engine(small_learner(target.double(), target_layers=["1"]))
    assert engine.step(X[:1], Y[:1])["meta_loss"].isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "hardmax"}, r"what='hardmax' is unknown: use 'softmax' or 'uniform'"),
        ({"where": "relu7"}, r"where='relu7' is unknown: use 'relu6', 'relu6-inward', 'relu', 'relu-avg', "
            "'softplus' or 'fixed'"),
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


@pytest.mark.parametrize("role", ["source", "target"])
def test_weights_that_are_not_finite(role: str) -> None:
    """Not called something else later, nor learned from."""
    networks = {"source": source_net((2, 2)), "target": small_net()}
    next(networks[role].parameters()).data[0] = float("nan")
    with pytest.raises(L2TError, match=rf"parameter '0.+weight' of the {role}( 0)? is not finite: load good weights"):
        L2T(networks["source"], networks["target"], source_layers=["0"], target_layers=["0"], example=X)


def test_nothing_to_train() -> None:
    learner = small_learner(small_net().requires_grad_(False))
    with pytest.raises(L2TError, match=r"the target has no parameter to train: set requires_grad"):
        Engine(learner)


class Once(torch.autograd.Function):
    """Its backward pass has no derivative, and says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g[0]


class OnceModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)  # type: ignore[no-any-return]


def test_what_has_no_second_derivative_is_refused_before_anything_is_trained() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), OnceModule(), nn.Flatten(), nn.Linear(144, 3)).double()
    source, x = small_net(nn.ReLU()), small_batch(0, 8)[0]
    before = {name: p.clone() for name, p in network.state_dict().items()}
    options: dict[str, Any] = {"source_layers": ["0"], "target_layers": ["0"], "example": x}
    with pytest.raises(L2TError, match=r"'1' of the target \(OnceModule\) cannot be differentiated twice"):
        Engine(L2T(source, network, **options))
    assert_identical(network.state_dict(), before)
    Engine(L2T(source, network, what="uniform", where="fixed", **options)).step(*small_batch(0, 8))  # no meta-gradient


def test_a_hardsigmoid_has_a_second_derivative() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardsigmoid(), nn.Flatten(), nn.Linear(144, 3)).double()
    plain = copy.deepcopy(network)
    options: dict[str, Any] = {"source_layers": ["0"], "target_layers": ["0"], "example": small_batch(0, 8)[0]}
    learner = L2T(source_net((2, 2)), network, **options)
    randomise(learner)
    engine = Engine(learner)
    reference = Reference(learner.sources[0], plain, pairs=[(0, 0, 0)], **options)
    take_state(reference, copy.deepcopy(engine.state_dict()))
    gradient = engine.meta_gradient(*small_batch(1, 8))
    assert_close(gradient, reference.meta_gradient(*small_batch(1, 8)))
    assert flat(gradient).norm() > 0


def test_one_network_as_source_and_target_is_refused() -> None:
    network = small_net(nn.ReLU())
    with pytest.raises(L2TError, match="share parameters: give the target a copy"):
        L2T(network, network, source_layers=["0"], target_layers=["0"], example=small_batch(0, 8)[0])


@pytest.mark.parametrize("name", ["beta", "inner_steps", "scheme", "precision", "memory", "learner"])
def test_what_is_fixed_cannot_be_set(name: str) -> None:
    engine = Engine(small_learner())
    with pytest.raises(L2TError, match=f"the {name} of an engine is fixed: make a new one"):
        setattr(engine, name, getattr(engine, name))


@pytest.mark.parametrize("name", ["lr", "meta_lr"])
def test_a_learning_rate_that_is_none_is_refused(name: str) -> None:
    engine = Engine(small_learner())
    before = getattr(engine, name)
    for value in (float("nan"), -0.1):
        with pytest.raises(L2TError, match=f"{name}=.* is not to be had"):
            setattr(engine, name, value)
    assert getattr(engine, name) == before


def test_frozen_projections_and_heads_stay() -> None:
    engine, reference = beside_the_reference(small_net(nn.Softplus()), ["0", "2"], size=8, warm=1)
    engine.learner.projections.requires_grad_(False)
    engine.learner.what.requires_grad_(False)
    with pytest.raises(L2TError, match=r"parameter 'projections.0.weight' was frozen after the engine was made"):
        engine.step(*small_batch(5, 8))
    anew = Engine(engine.learner, lr=0.05, weight_decay=1e-2)
    reference.projections.requires_grad_(False)
    reference.theta = {name: p for name, p in reference.theta.items() if p.requires_grad}
    reference.optimizer = torch.optim.SGD(reference.theta.values(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    reference.phi = {name: p for name, p in reference.phi.items() if name.startswith("where")}
    reference.meta_optimizer = torch.optim.Adam(reference.phi.values(), lr=1e-4, weight_decay=1e-4)
    before = copy.deepcopy(engine.learner.projections.state_dict())
    for seed in (5, 6):
        assert_close(anew.meta_gradient(*small_batch(seed, 8)), reference.meta_gradient(*small_batch(seed, 8)))
        anew.step(*small_batch(seed, 8))
        reference.step(*small_batch(seed, 8))
    assert_identical(engine.learner.projections.state_dict(), before)


class Aliased(nn.Module):
    """A running mean that is also held elsewhere."""

    def __init__(self, written: str, read: str) -> None:
        super().__init__()
        self.register_buffer("m", torch.zeros(4))
        self.held, self.view, self.pair = {"m": self.m}, self.m[:], (self.m,)
        self.written, self.read = written, read

    def forward(self, x: Tensor) -> Tensor:
        places = {"buffer": self.m, "dictionary": self.held["m"], "view": self.view, "tuple": self.pair[0]}
        places[self.written].mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return x - places[self.read][:, None, None]


@pytest.mark.parametrize("other", ["dictionary", "view", "tuple"])
@pytest.mark.parametrize("written", [True, False])
def test_a_buffer_reached_past_its_module_is_refused(other: str, written: bool) -> None:
    middle = Aliased(*(("buffer", other)[:: -1 if written else 1]))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.Flatten(), nn.Linear(144, 3)).double()
    middle.held, middle.view, middle.pair = {"m": middle.m}, middle.m[:], (middle.m,)  # double() made another
    options: dict[str, Any] = {"source_layers": ["0"], "target_layers": ["0"], "example": small_batch(0, 8)[0]}
    learner = L2T(source_net((2, 2)), network, **options)
    with pytest.raises(L2TError, match=r"buffer '1.m' of the target is reached past its module"):
        Engine(learner)


def test_images_of_another_size_or_depth_than_the_networks_take() -> None:
    """The target's BatchNorm has already seen the small ones when its pooling cannot go on."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4), nn.AdaptiveAvgPool2d(1)]
    target = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, CLASSES))
    engine = Engine(small_learner(target.double(), target_layers=["2"]))
    engine.step(X, Y)
    before = snapshot(engine)
    for x, message in (
        (X[:, :1], r"the images have 1 channels, those that the learner was made for 3: give \[B, 3, H, W\]"),
        (torch.cat([X, X], 1), r"the images have 6 channels"),
        (X[..., :3, :3], r"the target cannot run on images \[4, 3, 3, 3\]: .*too small"),
    ):
        for function in (engine.step, engine.meta_gradient):
            with pytest.raises(L2TError, match=message):
                function(x, Y)
            assert_identical(snapshot(engine), before)
    engine.step(torch.cat([X, X], -1), Y)


class _WritesSilently(nn.Module):
    """PyTorch's batch_norm writes its running statistics without raising their versions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("var", torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.batch_norm(x, self.mean, self.var, training=True)
        if x.shape[-1] < 8:
            raise ValueError("too small")
        return y


def test_buffers_written_silently_are_put_back() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), _WritesSilently(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    target = nn.Sequential(*layers, nn.Linear(4, CLASSES)).double()
    engine = Engine(small_learner(target, target_layers=["2"]))
    engine.step(X, Y)
    before = snapshot(engine)
    for function in (engine.step, engine.meta_gradient):
        with pytest.raises(L2TError, match="too small"):
            function(X[..., :4, :4], Y)
        assert_identical(snapshot(engine), before)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers)


def small_engine(**options: Any) -> Engine:
    made = L2T(small(), small(), source_layers=["2"], target_layers=["2"], example=torch.zeros(2, 3, 8, 8))
    return Engine(made, lr=0.1, meta_lr=1e-3, say=lambda text: None, **options)


IMAGES, LABELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("x", "y", "val", "words"),
    [
        (IMAGES.numpy(), LABELS, None, "x must be a tensor, or a list of them, not array"),
        ([[1]], LABELS, None, r"x must be a tensor, or a list of them, not \[\[1\]\]"),
        (None, LABELS, None, "x must be a tensor, or a list of them, not None"),
        (IMAGES, None, None, "y must be a tensor, or a list of them, not None"),
        (IMAGES, [0, 1, 2, 0], None, "y must be a tensor"),
        (IMAGES, LABELS, (IMAGES,), r"val must be \(images, labels\)"),
        (IMAGES, LABELS, 3, "val must be a tensor, or a list of them, not 3"),
        (IMAGES.to_sparse(), LABELS, None, "the images are torch.sparse_coo: give them as x.to_dense"),
        (IMAGES.to_mkldnn(), LABELS, None, "the images are torch._mkldnn"),
    ],
)
def test_batches_that_are_none(x: Any, y: Any, val: Any, words: str) -> None:
    subject = small_engine(scheme="simulation") if val is not None else small_engine()
    before = copy.deepcopy(subject.state_dict()["theta"])
    with pytest.raises(L2TError, match=words):
        subject.step(x, y, val)
    assert all(torch.equal(p, before[name]) for name, p in subject.state_dict()["theta"].items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": None}, "the source 0 must be a torch.nn.Module, not NoneType"),
        ({"sources": "resnet34"}, "the source 0 must be a torch.nn.Module, not str"),
        ({"target": None}, "the target must be a torch.nn.Module, not NoneType"),
        ({"example": None}, r"example must be images \[B, C, H, W\], not None"),
        ({"example": [1]}, r"example must be images \[B, C, H, W\], not \[1\]"),
        ({"terms": "at"}, "terms must be a list of functions that make them, not 'at'"),
        ({"terms": [3]}, r"terms must be a list of functions that make them, not \[3\]"),
    ],
)
def test_learners_that_are_none(changes: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"sources": small(), "target": small(), "example": IMAGES, **changes}
    with pytest.raises(L2TError, match=words):
        L2T(given.pop("sources"), given.pop("target"), source_layers=["2"], target_layers=["2"], **given)


def test_what_is_no_learner_no_images_or_no_state() -> None:
    with pytest.raises(L2TError, match="an Engine needs an L2T, not Sequential"):
        Engine(small())  # type: ignore[arg-type]
    subject = small_engine()
    with pytest.raises(L2TError, match="x must be images"):
        subject.learner.matching_loss([1])  # type: ignore[arg-type]
    state = copy.deepcopy(subject.state_dict())
    for change in (lambda t: t.long(), lambda t: t.to(torch.complex64), lambda t: t.to("meta")):
        odd = {**state, "theta": {name: change(tensor) for name, tensor in state["theta"].items()}}
        with pytest.raises(L2TError, match=r"this state does not fit the learner: 'target.0.weight' is torch"):
            subject.load_state_dict(odd)


def test_engines_in_threads_are_as_one_after_the_other() -> None:
    """Also one engine in several threads: each iteration is whole."""
    alone = small_engine()
    several = [small_engine(), small_engine()]
    for _ in range(10):
        alone.step(IMAGES, LABELS)

    def work(subject: Engine, steps: int) -> None:
        torch.set_num_threads(1)  # which each thread has for itself
        for _ in range(steps):
            subject.step(IMAGES, LABELS)

    jobs = [(several[0], 10), (several[1], 5), (several[1], 5)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda job: work(*job), jobs))
    for subject in several:
        for name, p in subject.state_dict()["theta"].items():
            assert torch.equal(p, alone.state_dict()["theta"][name])
