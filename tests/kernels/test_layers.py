"""The layers with their own second order against PyTorch's layers under the scheme that the engine runs."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor

from l2t_fast.errors import L2TError
from l2t_fast.kernels.layers import twins
from l2t_fast.kernels.layers.batch_norm import BatchNorm
from l2t_fast.kernels.layers.convolution import Convolution
from l2t_fast.kernels.layers.twins import replace_layers

pytestmark = pytest.mark.core

State = dict[str, Tensor]
Output = tuple[Tensor, State]  # an annotation inside a compiled function must not subscript


def plain_network(momentum: float | None = 0.1) -> nn.Module:
    """Every kind of convolution and BatchNorm, in float64, away from its initialization."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2, bias=False),
        nn.BatchNorm2d(6, momentum=momentum),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
        nn.BatchNorm2d(6, eps=1e-2, momentum=momentum),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 1, bias=False),
    ).double()
    for p in network.parameters():
        nn.init.normal_(p, mean=0.1, std=0.5)
    return network


def extractor(network: nn.Module) -> nn.Module:
    return create_feature_extractor(network, ["9"], suppress_diff_warning=True)


def images(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 9, 8, dtype=torch.float64).contiguous(memory_format=layout)


def inner_step(network: nn.Module, theta: State, x: Tensor, a: Tensor) -> tuple[State, State]:
    """(θ', buffers) after one step on the gradient whose cotangent is a y, which no buffer of the network sees."""

    def forward(theta: State) -> Output:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        state = {**theta, **buffers}
        y = torch.func.functional_call(network, state, (x,))["9"]
        return y, {name: state[name] for name in buffers}

    y, pull, buffers = torch.func.vjp(forward, theta, has_aux=True)
    (g,) = pull(a * y)
    return {name: p - 0.05 * g[name] for name, p in theta.items()}, buffers


def meta_gradient(network: nn.Module, x: Tensor, *, steps: int = 3, step: Any = inner_step) -> tuple[Tensor, State]:
    """(d Σθ²/da after some inner steps from a constant θ, the buffers after one forward pass)."""
    theta = {name: p.detach() for name, p in network.named_parameters()}
    a = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)[:, None, None].requires_grad_()
    buffers: State = {}
    for _ in range(steps):
        theta, buffers = step(network, theta, x, a)
    return torch.autograd.grad(sum(p.square().sum() for p in theta.values()), a)[0], buffers


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    ours, theirs = ours.double(), theirs.double()
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_meta_gradient_and_running_statistics(layout: torch.memory_format, momentum: float | None) -> None:
    theirs, ours = extractor(plain_network(momentum)), extractor(plain_network(momentum))
    replace_layers(ours)
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    x = images(layout)
    (g, buffers), (plain_g, plain_buffers) = meta_gradient(ours, x), meta_gradient(theirs, x)
    assert_close(g, plain_g)
    for name, buffer in plain_buffers.items():
        assert_close(buffers[name], buffer)
        assert torch.equal(ours.get_buffer(name), before[name])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_ordinary_training_and_evaluation(momentum: float | None) -> None:
    """Without functorch: outputs, gradients and running statistics of several passes, then evaluation mode."""
    theirs, ours = extractor(plain_network(momentum)), extractor(plain_network(momentum))
    replace_layers(ours)
    for scale in (1.0, 2.0, 3.0):
        y, plain_y = ours(scale * images())["9"], theirs(scale * images())["9"]
        y.square().sum().backward()
        plain_y.square().sum().backward()
        assert_close(y, plain_y)
    for name, p in theirs.named_parameters():
        grad, plain_grad = ours.get_parameter(name).grad, p.grad
        # A bias in front of BatchNorm has no gradient but rounding errors.
        torch.testing.assert_close(grad, plain_grad, rtol=1e-12, atol=1e-10)
    for name, buffer in theirs.named_buffers():
        assert_close(ours.get_buffer(name), buffer)
    assert_close(ours.eval()(images())["9"], theirs.eval()(images())["9"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [((1, 1), (1, 1), (1, 1), 1), ((2, 1), (0, 1), (1, 1), 2), ((1, 2), (2, 2), (2, 1), 1)],
    ids=["same", "strided and grouped", "dilated"],
)
def test_convolution_gradcheck(geometry: tuple, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 4 // geometry[-1], 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True) if bias else None
    assert torch.autograd.gradcheck(Convolution.apply, (x, w, b, *geometry))
    assert torch.autograd.gradgradcheck(Convolution.apply, (x, w, b, *geometry))
    assert torch.autograd.gradgradcheck(Convolution.apply, (x.detach(), w, b, *geometry))
    assert torch.autograd.gradgradcheck(Convolution.apply, (x, w.detach(), b, *geometry))


def test_batch_norm_gradcheck() -> None:
    torch.manual_seed(0)
    x = (3 + torch.randn(3, 2, 3, 2, dtype=torch.float64)).requires_grad_()
    gamma, beta = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def normalize(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return BatchNorm.apply(x, gamma, beta, 1e-3)[0]

    assert torch.autograd.gradcheck(normalize, (x, gamma, beta))
    assert torch.autograd.gradgradcheck(normalize, (x, gamma, beta))
    assert torch.autograd.gradgradcheck(normalize, (x.detach(), gamma, beta))
    assert torch.autograd.gradgradcheck(normalize, (x, gamma.detach(), beta.detach()))


class Calls(TorchDispatchMode):
    """Counts what reaches ATen."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_first_step_needs_no_product_with_respect_to_theta() -> None:
    """With constant θ the adjoint is the chain from u_x, u_w to v_g: no convolution_backward, no Σ u g."""
    network = extractor(plain_network())
    replace_layers(network)
    theta = {name: p.detach() for name, p in network.named_parameters()}
    a = torch.ones(5, 1, 1, dtype=torch.float64, requires_grad=True)
    theta, _ = inner_step(network, theta, images(), a)
    with Calls() as calls:
        torch.autograd.grad(sum(p.square().sum() for p in theta.values()), a)
    assert calls.count["convolution_backward"] == 0
    assert calls.count["convolution"] == 2 * 4 - 1  # the images have no u_x
    assert calls.count["native_batch_norm_backward"] == 3


def test_user_module_keeps_its_layers_and_shares_tensors() -> None:
    user = nn.Sequential(plain_network(), nn.Flatten())
    kinds = [type(m) for m in user.modules()]
    tapped = create_feature_extractor(user, ["0.9"], suppress_diff_warning=True)
    replace_layers(tapped)
    assert [type(m) for m in user.modules()] == kinds
    assert {type(m) for m in tapped.modules()} >= {twins.Conv2d, twins.BatchNorm2d}
    assert not {type(m) for m in tapped.modules()} & {nn.Conv2d, nn.BatchNorm2d}
    assert tapped.state_dict().keys() == user.state_dict().keys()
    for module in (tapped.float(), user.double(), tapped.half()):
        dtype = next(module.parameters()).dtype
        for name, tensor in user.state_dict(keep_vars=True).items():
            assert tapped.state_dict(keep_vars=True)[name] is tensor
            assert tensor.dtype == dtype or not tensor.is_floating_point()


def test_other_layers_are_left_alone() -> None:
    shared = nn.Conv2d(2, 2, 1)
    network = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.BatchNorm2d(2, affine=False),
        shared,
        nn.Sequential(shared, nn.Conv2d(2, 2, 1)),
    )
    names = [str(i) for i in range(3)]
    tapped = create_feature_extractor(network, ["4.1"], suppress_diff_warning=True)
    replace_layers(tapped)
    assert all(tapped.get_submodule(name) is network.get_submodule(name) for name in names)
    assert isinstance(tapped.get_submodule("3"), twins.Conv2d)
    assert tapped.get_submodule("3") is not network[3]


def test_calls_that_are_not_covered() -> None:
    """Half precision runs as in PyTorch, one value per channel raises as in PyTorch."""
    network = copy.deepcopy(plain_network()).bfloat16()
    tapped = extractor(network)
    replace_layers(tapped)
    x = images().bfloat16()
    assert torch.equal(tapped.eval()(x)["9"], network.eval()(x))
    norm = create_feature_extractor(nn.Sequential(nn.BatchNorm2d(3)), ["0"], suppress_diff_warning=True)
    replace_layers(norm)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm.train()(torch.ones(1, 3, 1, 1))


def test_third_order_is_refused() -> None:
    network = extractor(plain_network())
    replace_layers(network)
    parameters = [p for p in network.parameters() if p.dim() > 1]
    loss = network(images())["9"].pow(3).sum()
    for _ in range(2):
        g = torch.autograd.grad(loss, parameters, create_graph=True)
        loss = sum(g_p.pow(3).sum() for g_p in g)
    with pytest.raises(L2TError, match="no third derivative"):
        torch.autograd.grad(loss, parameters)


def test_compiled_step_gives_the_same() -> None:
    network = extractor(plain_network())
    theirs, _ = meta_gradient(network, images(), steps=2)
    replace_layers(network)
    step = torch.compile(inner_step, fullgraph=True, backend="aot_eager")
    ours, _ = meta_gradient(network, images(), steps=2, step=step)
    assert_close(ours, theirs)
