"""Networks that can be differentiated twice, where PyTorch's own kernels can be differentiated once.

The meta-gradient differentiates ∇θ of a step, so every operation of the target needs a second derivative. A survey of
torch.nn, of the functionals of vision and of torchvision.ops (`tests/engine/test_second_order.py` repeats it) finds
few that exist mathematically and that PyTorch lacks. What `SecondOrder.context` puts in their places:

- scaled_dot_product_attention, and with it MultiheadAttention and the Transformer modules: its math backend, the same
  formula as products and a softmax. (Their own fast path is taken only where nothing is differentiated.)
- hardsigmoid h, also in place: PyTorch's kernels for its value and for its gradient g ↦ g·h'(x). The latter is linear
  in g, so its own derivative is itself; and piecewise constant in x, so there it is zero.
- normalize: the norm of an all-zero vector (a padded token) is put in as the constant 0; PyTorch's second derivative is
  NaN there, though x / max(|x|, ε) is x / ε around zero.
- weight_norm, and embeddings under `scale_grad_by_freq`: the same formulas in plain operations. PyTorch's second
  derivatives of these are wrong without a word: they take the norm, and the counts, for what they are not.
- LSTM, GRU and RNN on CUDA, and grid_sample there: PyTorch's own kernels instead of cuDNN's, the same formulas.

What stays without: roi_align, roi_pool, ps_roi_align, deform_conv2d, EmbeddingBag, CrossMapLRN2d,
segment_reduce, CTC and margin losses, functions marked `once_differentiable`; `examine` names the module with one.
A second derivative that is infinite or NaN with the trial's numbers (LPPool of zeros, sqrt at zero) is let pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from l2t_fast.errors import UnfitError, first_line
from l2t_fast.learner.reach import nodes_of
from l2t_fast.learner.undisturbed import undisturbed


class _HardsigmoidGradient(torch.autograd.Function):
    """g·h'(x) by PyTorch's kernel: its slopes and its zeros at both kinks, of all orders."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gradient: Tensor = torch.ops.aten.hardsigmoid_backward(g, x)
        return gradient

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> tuple[Tensor, None]:
        return _HardsigmoidGradient.apply(u[0], *ctx.saved_tensors), None


class _Hardsigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.hardsigmoid(x)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return _HardsigmoidGradient.apply(g[0], *ctx.saved_tensors)  # type: ignore[no-any-return]


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """F.hardsigmoid(x); the name of the argument is PyTorch's."""
    if not inplace:
        return _Hardsigmoid.apply(input)  # type: ignore[no-any-return]
    return input.copy_(_Hardsigmoid.apply(input.clone()))


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """F.normalize; the names of the arguments are PyTorch's. (With `out` nothing is differentiated.)"""
    if out is not None:
        return F.normalize(input, p, dim, eps, out)
    zero = (input == 0).all(dim, keepdim=True)
    norm = torch.where(zero, 1.0, input).norm(p, dim, keepdim=True)
    return input / torch.where(zero, 0.0, norm).clamp_min(eps).expand_as(input)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm: g v / |v|, with the norm over all axes but `dim`."""
    norm: Tensor = torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding, whose gradient is, if so asked, divided by how often each row is read; the names are PyTorch's."""
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, False, sparse)
    if not scale_grad_by_freq:
        return rows
    _, places, counts = input.unique(return_inverse=True, return_counts=True)
    scaled = rows / counts[places].unsqueeze(-1)
    of_scaled: Tensor = rows.detach() + (scaled - scaled.detach())
    return of_scaled


def _torch_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    padding = None if padding_idx == -1 else padding_idx
    return _embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _without_cudnn(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        return function(*args, **kwargs)
    finally:
        torch.backends.cudnn.enabled = enabled


_TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.hardsigmoid: _hardsigmoid,
    F.normalize: _normalize,
    torch._weight_norm: _weight_norm,
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: partial(_hardsigmoid, inplace=True),
    **{
        function: partial(_without_cudnn, function)
        for function in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, F.grid_sample, torch.grid_sampler)
    },
}


class Replacements(TorchFunctionMode):
    """Runs, for functions of the table above, what stands beside them; costs each torch call microseconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _TABLE.get(func, func)(*args, **(kwargs or {}))


_SILENT = (F.normalize, torch._weight_norm, F.embedding, torch.embedding)


class _Watch(TorchFunctionMode):
    """Whether a function is called whose second derivative no trial shows to be missing.

    That is wrong, or, of normalize, NaN on another batch, where a vector is zero.
    """

    met = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.met |= func in _SILENT
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class SecondOrder:
    """How forward passes of a network run, so that their gradients can be differentiated."""

    replace: bool = False

    @contextmanager
    def context(self) -> Iterator[None]:
        """For forward passes; the backward passes may run outside.

        Attention always runs on the math backend (tens of microseconds to enter and leave), since a network may reach
        it on some batches only; `Replacements` only where the network needs them.
        """
        with sdpa_kernel(SDPBackend.MATH):
            if not self.replace:
                yield
                return
            with Replacements():
                yield


def examine(
    module: nn.Module, run: Callable[[], Any], parameters: Sequence[Tensor], *, role: str = "target"
) -> SecondOrder:
    """Differentiates one forward pass twice, to find out how `module` must run.

    Args:
        module: the network; it and all in it are left as they were (`undisturbed`).
        run: a forward pass of `module` in the mode it is in, on a small batch; returns its outputs (tensors, in tuples,
            lists and dictionaries as it likes).
        parameters: what the gradients are taken of.
        role: names the module in errors.

    Raises:
        UnfitError: it cannot be differentiated twice; names the innermost module to which this is due, and PyTorch's
            reason. What the forward pass itself raises passes through.
    """
    device = next((p.device for p in parameters), torch.device("cpu"))
    with undisturbed(module, device), torch.enable_grad():
        errors = {}
        for way in (SecondOrder(), SecondOrder(replace=True)):
            with way.context(), _Watch() as watch:
                outputs = run()
            errors[way] = differentiate_twice(outputs, parameters)
            if errors[way] is None and (way.replace or not watch.met):
                return way
        for way, error in errors.items():
            if error is None or isinstance(error, NotFinite):  # with these numbers; nothing here mends it
                return way
        name, culprit, error = _culprit(module, run) or ("", module, error)
    place = f"'{name}' of the {role}" if name else f"the {role}"
    raise UnfitError(
        f"{place} ({type(culprit).__name__}) cannot be differentiated twice ({first_line(error)}): compose it of "
        "operations that have second derivatives."
    ) from error


class NotFinite(Exception):
    """A second derivative is infinite or NaN where the first is not."""


def differentiate_twice(outputs: Any, inputs: Sequence[Tensor]) -> Exception | None:
    """What differentiating Σ mean(outputs²) twice raises: squares, so that every gradient depends on the inputs."""
    inputs = [x for x in inputs if x.requires_grad]
    values = [y.abs().square().mean() for y in _tensors(outputs) if y.requires_grad]
    if not values or not inputs:
        return None
    try:
        first = torch.autograd.grad(values, inputs, create_graph=True, allow_unused=True)
        squares = [g.abs().square().sum() for g in first if g is not None and g.requires_grad]
        _raise_what_grad_passes_over(squares)
        if squares:
            second = torch.autograd.grad(squares, inputs, allow_unused=True)
            if _finite(first) and not _finite(second):
                return NotFinite()
    except Exception as error:  # whatever a backward pass may raise
        return error
    return None


def _finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def _raise_what_grad_passes_over(values: Sequence[Tensor]) -> None:
    """Runs the error that `once_differentiable` leaves in a graph.

    It hangs beside the way to the inputs, where `torch.autograd.grad` never goes: without this, terms would be missing.
    """
    for node in nodes_of(values):
        if node.name() == "torch::autograd::Error":
            node(values[0])


def _culprit(module: nn.Module, run: Callable[[], Any]) -> tuple[str, nn.Module, Exception] | None:
    """The first module to return in `run`, so a child before its parent, that fails by itself on what it got there."""
    way, names = SecondOrder(replace=True), {m: name for name, m in module.named_modules()}
    calls: dict[nn.Module, Any] = {}
    returned: dict[nn.Module, None] = {}

    def enter(called: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(called, _mapped(_leaf, (args, kwargs)))

    def leave(called: nn.Module, _args: Any, _output: Any) -> None:
        returned.setdefault(called)

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True, prepend=True) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    try:
        with way.context():
            run()
    finally:
        for handle in handles:
            handle.remove()
    for called in returned:
        args, kwargs = _mapped(Tensor.clone, calls[called])  # an operation in place may not write to a leaf
        try:
            with way.context():
                outputs = called(*args, **kwargs)
        except Exception:  # a module that cannot run alone is not the one to name
            continue
        error = differentiate_twice(outputs, [*called.parameters(), *_tensors(calls[called])])
        if error is not None and not isinstance(error, NotFinite):
            return names[called], called, error
    return None


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def _mapped(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """`values` with the tensors in its tuples, lists and dictionaries replaced."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, dict):
        return {key: _mapped(function, value) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_mapped(function, value) for value in values) if type(values) in (tuple, list) else values
    return values


def _tensors(values: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() or values.is_complex() else []
    if isinstance(values, dict):
        values = [*values.values()]
    return [x for value in values for x in _tensors(value)] if isinstance(values, tuple | list) else []
