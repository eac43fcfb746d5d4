"""BatchNorms whose result waits for what follows: a sum and a ReLU become part of the same operator.

In eager PyTorch y = bn(x) is a tensor before anybody can know that `relu(y + shortcut)` comes next. Where Triton
computes, the BatchNorm's twin returns one that has no values yet. Who first asks for them makes them: whatever reads,
changes or prints such a tensor gets what it would always get, with the same graph behind it. ReLU, and a sum in front
of it, however they are written, do not ask, but make the fused operator of x; then y itself is never computed.

Nothing is traced or assumed of the network. Where x or the other summand is overwritten while y still waits, there is
an L2TError, since y is no longer to be had.

Who looks at torch's functions gets a plain tensor, the values with their graph (`_real`). A custom autograd Function
goes past these, by the graph of the waiting tensor itself: so that has to follow what happens in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from l2t_fast.errors import L2TError
from l2t_fast.kernels import launch
from l2t_fast.kernels.layers.autograd import mark_again
from l2t_fast.kernels.layers.batch_norm import BatchNorm, batch_statistics, fused, normalised, untraced

_T = Tensor
_RELU: dict[Callable[..., Any], bool] = {  # whether it is in place, where it does not say so itself
    **dict.fromkeys((F.relu, torch.relu, _T.relu, torch.ops.aten.relu, torch.ops.aten.relu.default), False),
    **dict.fromkeys((F.relu_, torch.relu_, _T.relu_), True),
}
_ADD: dict[Callable[..., Any], bool] = {
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), False),
    **dict.fromkeys((_T.add_, _T.__iadd__), True),
}
# What a tensor without values knows of itself.
_KNOWN = {
    *(_T.size, _T.dim, _T.numel, _T.stride, _T.is_contiguous, _T.is_floating_point, _T.__len__, _T.__hash__),
    *(
        getattr(_T, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_leaf")
    ),
}


class Input(NamedTuple):
    """What the fused operator is computed of."""

    x: Tensor  # [B, C, H, W]
    gamma: Tensor
    beta: Tensor
    eps: float
    statistics: tuple[Tensor, Tensor]  # μ, 1/σ [C] of x; in evaluation mode μ, σ² − ε, and there is no graph
    evaluating: bool = False
    addend: Tensor | None = None  # [B, C, H, W]

    def versions(self) -> list[int]:
        read = (self.x, self.gamma, self.beta, self.addend, *self.statistics)
        return [t._version for t in read if t is not None]

    def apply(self, relu: bool, make: Callable[..., Tensor] | None = None) -> Tensor:
        if self.evaluating:
            read = (self.x, self.gamma, self.beta, *self.statistics, self.addend, relu, self.eps)
            return (make or normalised)(*read)
        arguments = (self.x, self.gamma, self.beta, self.eps, self.addend, relu, self.statistics, make)
        y, *_, again = BatchNorm.apply(*arguments)
        mark_again(y, again)
        return y  # type: ignore[no-any-return]


def may_wait(x: Tensor) -> bool:
    """Whether the y of this x may; compilers and torch.func take it at once, and in inference mode nothing counts
    what is written.
    """
    return untraced() and fused(x) and not (torch.is_inference_mode_enabled() or x.is_inference())


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `batch_norm.batch_norm`, of an x that Triton computes on, with a y that waits."""
    mean, rstd = batch_statistics(x.detach(), eps)
    return _waiting(Input(x, gamma, beta, eps, (mean, rstd))), mean, rstd


def evaluated(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, mean: Tensor, variance: Tensor) -> Tensor:
    """Of an x that Triton computes on, in evaluation mode and without gradients: y, which waits."""
    return _waiting(Input(x, gamma, beta, eps, (mean, variance), evaluating=True))


def _waiting(given: Input) -> Tensor:
    """y = γ x̂ + β + addend that has its node in the graph, and no values."""

    def make(x: Tensor, *others: Any) -> Tensor:
        return Pending(x, lambda: normalised(x, *others))

    with torch._C.DisableTorchFunctionSubclass():
        y = given.apply(False, make)
    assert isinstance(y, Pending)
    y.given, y.versions, y.grad_mode = given, given.versions(), torch.is_grad_enabled()
    return y


class Pending(Tensor):
    """y of a BatchNorm, like its x; see above.

    Attributes:
        given: what it is computed of. versions: of these, when it was called for.
        become: the tensor that is in its place by now: its values, or what an operation in place made of it.
    """

    given: Input
    versions: list[int]
    grad_mode: bool
    become: Tensor | None
    _make: Callable[[], Tensor]
    aliases: "list[Pending]"  # that have become this one
    _seen: tuple[int, int]  # the tensor that it is, and its version

    @staticmethod
    def __new__(cls, x: Tensor, make: Callable[[], Tensor]) -> "Pending":
        y: Pending = Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)
        y._make, y.become, y.aliases = make, None, []
        return y

    def __init__(self, *arguments: Any) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _RELU and isinstance(args[0], Pending) and (y := args[0]._end())._waits():
            return y._relu(kwargs.get("inplace", len(args) > 1 and args[1] is True) or _RELU[func])
        if func in _ADD and len(args) == 2 and not kwargs:
            first, second = args if isinstance(args[0], Pending) else args[::-1]
            if isinstance(second, Pending):  # both: the second is a summand like any
                second = second._real()
            y = first._end()
            if y._waits() and y._takes(second) and (first is args[0] or not _ADD[func]):
                return y._add(second, _ADD[func])
        read: list[Pending] = []

        def real(y: Pending) -> Tensor:
            read.append(y)
            return y._real()

        args, kwargs = tree_map_only(Pending, real, (args, kwargs))
        result = func(*args, **kwargs)
        if torch.is_grad_enabled():
            for y in read:  # what func has overwritten
                y._real()
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Of what passes by `__torch_function__`, such as a Function of the user's: below autograd, on the values."""
        args, kwargs = tree_map_only(Pending, Pending._below, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _waits(self) -> bool:
        return self.become is None and self.grad_mode == torch.is_grad_enabled()

    def _takes(self, addend: Any) -> bool:
        """Whether the sum with `addend` is one of the fused operator."""
        x = self.given.x
        alike = type(addend) is Tensor and (addend.shape, addend.dtype, addend.device) == (x.shape, x.dtype, x.device)
        return alike and self.given.addend is None and launch.is_dense(addend)

    def _checked(self) -> Input:
        if self.given.versions() != self.versions:
            raise L2TError(
                "what a BatchNorm2d of the target reads, or is added to its result, is overwritten in place before "
                "that result is read: build the network without that operation in place."
            )
        return self.given

    def _relu(self, inplace: bool) -> Tensor:
        return self._taken_for(self._checked().apply(True), inplace)

    def _add(self, addend: Tensor, inplace: bool) -> Tensor:
        return self._taken_for(_waiting(self._checked()._replace(addend=addend)), inplace)

    def _taken_for(self, result: Tensor, inplace: bool) -> Tensor:
        if inplace:
            self._becomes(result)
        return result

    def _becomes(self, result: Tensor) -> None:
        """From now on this is `result`, in the graph too, and so are those that had become this."""
        those = [self, *self.aliases]
        with torch._C.DisableTorchFunctionSubclass():
            for y in those:
                _Become.apply(y, result)
        self._note(result)
        if isinstance(result, Pending):
            result.aliases += those

    def _note(self, result: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for y in (self, *self.aliases):
                y.become, y._seen = result, (id(result), result._version)

    def _end(self) -> "Pending":
        """What it has become by sums in place, if that still waits."""
        return self.become if isinstance(self.become, Pending) else self

    def _real(self) -> Tensor:
        """The tensor that it is, with its values; what has overwritten these since is in its graph then.

        Raises:
            L2TError: it is not, since gradients are off; by a custom Function, the graph would go on from where it was.
        """
        last = self._end()
        if last.become is None:
            with torch._C.DisableTorchFunctionSubclass(), torch.set_grad_enabled(last.grad_mode):
                last._note(_Values.apply(last))
        real = self.become
        assert real is not None
        if (id(real), real._version) != self._seen:
            if self.grad_mode and not torch.is_grad_enabled():
                raise L2TError(
                    "the result of a BatchNorm2d of the target is overwritten in place under another name, and then "
                    "read without gradients or by a custom Function: build the network without that operation in place."
                )
            self._becomes(real)
        return real

    def _below(self) -> Tensor:
        """The values, for who goes by the graph of this tensor."""
        if self.become is not None:
            return self._real().detach()
        self._checked()
        return self._make()


class _Values(torch.autograd.Function):
    """The values of a `Pending` as a tensor of their own, behind it in the graph."""

    @staticmethod
    def forward(ctx: Any, y: Pending) -> Tensor:
        return y._below()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class _Become(torch.autograd.Function):
    """(y, result) -> y, overwritten by the result."""

    @staticmethod
    def forward(ctx: Any, y: Pending, result: Tensor) -> Pending:
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, g
