"""What the layers' autograd Functions share: the end of differentiation, and casts of many tensors at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from l2t_fast.errors import L2TError

_constant = False  # for the whole process: on CUDA autograd runs backward passes in threads of its own


@contextmanager
def constant_primals() -> Iterator[None]:
    """The gradients taken inside will be differentiated with respect to their cotangents alone.

    Autograd itself leaves out what nobody asks for, but cannot tell a Function of Python's.
    """
    global _constant
    before, _constant = _constant, True
    try:
        yield
    finally:
        _constant = before


_once = False  # likewise


@contextmanager
def differentiated_once() -> Iterator[None]:
    """What passes forward inside will be differentiated once at most.

    There PyTorch's own layers are no slower, and spare a CPU some ten microseconds of Python a call.
    """
    global _once
    before, _once = _once, True
    try:
        yield
    finally:
        _once = before


def plain_suffices(x: Tensor) -> bool:
    """Whether PyTorch's own layer does on x: on a CPU, where nobody differentiates twice."""
    return x.device.type == "cpu" and type(x) is Tensor and (_once or not torch.is_grad_enabled())


def derivatives_wanted(needs: Sequence[bool]) -> tuple[bool, ...]:
    """Of a gradient's cotangent, `needs` as they are; of its primals, which follow, none inside `constant_primals`."""
    return (needs[0], *(need and not _constant for need in needs[1:]))


class Last(torch.autograd.Function):
    """f(*inputs), which must not be differentiated again (`once_differentiable` is silent in `torch.autograd.grad`)."""

    @staticmethod
    def forward(f: Callable[..., Any], *inputs: Any) -> Any:
        return f(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise L2TError(
            "Conv2d and BatchNorm2d of a tapped network have no third derivative: take it on the untapped module."
        )


# A gradient that sums to zero over each channel: BatchNorm takes the mean out of what it gives, so that a bias in front
# of it has the gradient zero, and its cotangent no effect.


def mark_zero_sums(g: Tensor) -> None:
    """Says so of g [B, C, H, W], as long as it is not written to."""
    if type(g) is Tensor:
        g.zero_sums = g._version  # type: ignore[attr-defined]


def has_zero_sums(g: Tensor) -> bool:
    """Whether g was marked; a tensor that was made of a marked one (a sum, what a hook gives) is not."""
    return type(g) is Tensor and getattr(g, "zero_sums", None) == g._version


# A tensor that a Function returns twice, once more for who reads it in a gradient: what it is due as that arrives by
# itself, and is read as a second summand instead of being added up in a pass of its own.


def mark_again(t: Tensor, again: Tensor | None) -> None:
    """`again` is what t is to be read as in gradients, as long as t is not written to."""
    if again is not None and type(t) is Tensor:
        t.again = again, t._version  # type: ignore[attr-defined]


def read_again(t: Tensor) -> Tensor | None:
    """What t was marked with; not where hooks are to act on all that t is due."""
    again, version = getattr(t, "again", (None, None))
    return again if version == t._version and not t._backward_hooks else None


_left_out = False  # likewise


@contextmanager
def zeros_left_out() -> Iterator[None]:
    """In gradients taken inside, None is zero for parameters that `may_lack` one: no buffer of zeros is filled."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


def may_lack(p: Tensor, unwatched: bool) -> None:
    """Says of a parameter, or what stands in for one, whether nobody but the engine sees its gradient."""
    p.unwatched = unwatched  # type: ignore[attr-defined]


def is_unwatched(p: Tensor) -> bool:
    """Whether `may_lack` said so; not in a pass that someone's own backward makes, who may want the gradient there."""
    return getattr(p, "unwatched", False) and torch._C._current_graph_task_id() == -1


def is_left_out(p: Tensor) -> bool:
    """Whether the gradient of this unwatched p, which is zero, is None; hooks may have come since."""
    return _left_out and not p._backward_hooks


# Parameters in lower precision, all at once: many small casts would cost a launch each.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies of the tensors in another dtype, differentiable."""
    return Cast.apply(dtype, *tensors)  # type: ignore[no-any-return]


class Cast(torch.autograd.Function):
    """(dtype, *x) -> copies in that dtype, laid out in memory as x."""

    @staticmethod
    def forward(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _copies(dtype, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtypes = [t.dtype for t in inputs[1:]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *u: Tensor | None) -> Any:
        given = [g for g in u if g is not None]
        wide = iter(_copies(ctx.dtypes[0], given))
        return None, *(None if g is None else next(wide) for g in u)


def _copies(dtype: torch.dtype, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
