"""L_org: cross entropy, or any function of the target's outputs and the labels, tried before it is trusted."""

import functools
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.bounds import shown
from l2t_fast.engine.inner_step import LossFunction
from l2t_fast.engine.second_order import NotFinite, SecondOrder, differentiate_twice
from l2t_fast.errors import L2TError, UnfitError, first_line
from l2t_fast.learner.attributes import settings_of, versions_of
from l2t_fast.learner.generators import generators_kept
from l2t_fast.learner.reach import nodes_of
from l2t_fast.learner.undisturbed import undisturbed

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Loss:
    """The function, and what is known of its labels.

    classes: it is a cross entropy; its labels are classes or probabilities of them, and accuracy means something.
    ignored: the class that counts for nothing. weighted: classes count for more or less.
    """

    function: LossFunction = F.cross_entropy
    classes: bool = True
    ignored: int | None = None
    weighted: bool = False

    @classmethod
    def of(cls, function: Any, output_shape: tuple[int, ...]) -> "Loss":
        """output_shape: of the target's outputs, without the batch.

        Raises:
            L2TError: it is no function, or cross entropy of outputs without classes.
        """
        if not callable(function) or isinstance(function, type):
            raise L2TError(f"loss={shown(function)} is not to be had: give a function of (outputs, labels).")
        options = dict(vars(function)) if isinstance(function, nn.Module) else {}
        inner = function
        while isinstance(inner, functools.partial):
            options, inner = {**inner.keywords, **options}, inner.func
        classes = inner in (F.cross_entropy, F.nll_loss) or isinstance(inner, nn.CrossEntropyLoss | nn.NLLLoss)
        if classes and not output_shape:
            raise L2TError("the target returns [B], which has no classes: give the loss= that it learns by.")
        ignored = options.get("ignore_index", -100) if classes and function is not F.cross_entropy else None
        return cls(function, classes, ignored, classes and options.get("weight") is not None)

    def accuracy(self, outputs: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """The share of the labels that the outputs get right, a scalar; of soft labels, what they give to the guess."""
        guess = outputs.argmax(1)
        if y.is_floating_point():
            return y.gather(1, guess.unsqueeze(1)).to(dtype).sum() / guess.numel()
        if self.ignored is None:
            return (guess == y).to(dtype).mean()
        counted = y != self.ignored
        return ((guess == y) & counted).sum().to(dtype) / counted.sum()


_PAST_OUTPUTS = (
    "the loss depends on parameters of its own, or of the target past its outputs, which a simulated step does not "
    "change: make them part of the target, or freeze them."
)


def try_loss(
    function: LossFunction, outputs: Tensor, y: Tensor, *, twice: bool = True, through: Sequence[Tensor] = ()
) -> SecondOrder:
    """Computes and differentiates the loss, `twice` if asked to, and puts back what that changes; how it must run.

    through: leaves of autograd that it may lead to beside the outputs.

    Raises:
        L2TError: it cannot be computed on these, gives no scalar, depends on parameters or not on the outputs, is not
            finite, or gives something else when it is called again. UnfitError: it has no second derivative.
    """
    leaf = outputs.detach().requires_grad_()
    holder = function if isinstance(function, nn.Module) else nn.Module()
    with undisturbed(holder, outputs.device), torch.enable_grad():
        value = _value(function, leaf, y)  # the first call may cache something
        known = {id(t) for t in (leaf, *through)}
        if any(id(getattr(node, "variable", leaf)) not in known for node in nodes_of([value])):
            raise L2TError(_PAST_OUTPUTS)
        if not value.requires_grad:
            raise L2TError(
                "the loss does not depend on the target's outputs by operations that have a derivative: use such."
            )
        before = settings_of_loss(function), _versions(function)
        again = _value(function, leaf, y)
        if (settings_of_loss(function), _versions(function)) != before:
            raise L2TError(
                "the loss changes what it holds (a buffer, an attribute, a variable) in each call, and simulated steps "
                "call it too: change that outside of it, after a step."
            )
        if not torch.allclose(value, again, rtol=1e-3, equal_nan=True):
            raise L2TError("the loss gives something else for the same outputs and labels each time: mend that.")
        (slope,) = torch.autograd.grad(again, leaf, retain_graph=True)
        if not bool(again.isfinite()) or not bool(slope.isfinite().all()):
            raise L2TError(
                f"the loss or its gradient is not finite on the first batch ({again.item()}): mend the labels, or "
                "bound it."
            )
        if not twice:
            return SecondOrder()
        error: Exception | None = None
        for way in (SecondOrder(), SecondOrder(replace=True)):
            with way.context():
                error = differentiate_twice(_value(function, leaf, y), [leaf])
            if error is None:
                return way
    if isinstance(error, NotFinite):
        raise L2TError("the second derivative of the loss is not finite on the first batch: bound it.")
    reason = first_line(error)
    raise UnfitError(
        f"the loss cannot be differentiated twice ({reason}): compose it of operations that have second derivatives."
    ) from error


@torch.no_grad()
def check_unread(function: LossFunction, outputs: Tensor, y: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raises L2TError where the loss reads these, parameters and buffers of the target; their values are lost."""
    value = _value(function, outputs, y)
    for tensor in tensors:
        tensor.data.fill_(torch.nan) if tensor.is_floating_point() else tensor.data.add_(1)
    try:
        unread = torch.allclose(value, _value(function, outputs, y), equal_nan=True)
    except L2TError:
        unread = False
    if not unread:
        raise L2TError(
            "the loss reads parameters or buffers of the target, and simulated steps have others in their places: "
            "let the target return what the loss needs, or set it as an attribute in each pass."
        )


@torch.no_grad()
def check_mean(loss: Loss, outputs: Tensor, y: Tensor) -> None:
    """Raises L2TError where the loss of a batch is not the mean of its parts' weighted by their images."""
    outputs, y = (torch.cat([t, t]) if len(t) == 1 else t for t in (outputs, y))
    part = len(y) // 2
    sizes = [part, len(y) - part]
    with undisturbed(loss.function if isinstance(loss.function, nn.Module) else nn.Module(), outputs.device):
        whole = _value(loss.function, outputs, y)
        parts = [_value(loss.function, *of) for of in zip(outputs.split(sizes), y.split(sizes), strict=True)]
    mean = sum(value * size / len(y) for value, size in zip(parts, sizes, strict=True))
    weighted = loss.weighted and not y.is_floating_point()  # which labels all of one class would not show
    if weighted or not torch.allclose(whole, torch.as_tensor(mean), rtol=1e-4, atol=1e-6):
        raise L2TError(
            "the loss of a batch is not the mean over its images, as accumulate= and group= need it (class weights, "
            "ignored labels and sums are not): reduce it by a mean over images, or give the whole batch."
        )


def _value(function: LossFunction, outputs: Tensor, y: Tensor) -> Tensor:
    """The loss, from the random numbers that stand now."""
    given = f"outputs {outputs.dtype} {list(outputs.shape)} and labels {y.dtype} {list(y.shape)}"
    try:
        with generators_kept(outputs.device), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Using a target size")  # what is broadcast is a mistake
            value: Any = function(outputs, y)
    except Exception as error:  # whatever a loss may raise
        line = first_line(error)
        raise L2TError(f"the loss cannot be computed on {given} ({line}): give those that it takes.") from error
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise L2TError(f"the loss gives {what}, not a scalar: reduce it, as by .mean().")
    return value


def settings_of_loss(function: Any) -> list[Any]:
    """What a captured or compiled iteration has frozen of a loss: numbers, and where its tensors and objects are."""
    found: list[Any] = []
    for value in _held(function, set()):
        if isinstance(value, nn.Module):
            found += settings_of(value)
        elif isinstance(value, Tensor):
            found.append(value.data_ptr())
        else:
            found.append(value if isinstance(value, _SIMPLE) else id(value))
    return found


def _versions(function: Any) -> list[Any]:
    """Of the tensors that a loss holds: a write counts one up."""
    found: list[Any] = []
    for value in _held(function, set()):
        if isinstance(value, nn.Module):
            found += [t._version for t in (*value.parameters(), *value.buffers())] + versions_of(value)
        elif isinstance(value, Tensor):
            found.append(value._version)
    return found


def _held(value: Any, seen: set[int]) -> Iterator[Any]:
    """What decides what a function gives beside its arguments: closures, defaults, attributes, globals it names."""
    if isinstance(value, _SIMPLE):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, nn.Module):
        parts = [type(value).forward]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        parts = _of_code(value) if _is_users(value) else []
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    elif isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif not isinstance(value, type | types.ModuleType | Tensor) and _is_users(type(value)):
        parts = [*getattr(value, "__dict__", {}).values(), type(value).__call__ if callable(value) else None]
    yield value
    for part in parts:
        yield from _held(part, seen)


def _of_code(function: types.FunctionType) -> list[Any]:
    parts: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty yet
            parts.append(cell.cell_contents)
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        named = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        parts += named
        for module in named:
            if isinstance(module, types.ModuleType):  # as `settings.SMOOTHING`
                members = [vars(module).get(name) for name in code.co_names]
                parts += [member for member in members if isinstance(member, _SIMPLE)]
    return parts


def _is_users(thing: Any) -> bool:
    """Whether its code is no library's that stands still."""
    return str(getattr(thing, "__module__", "")).split(".")[0] not in ("torch", "builtins", "functools", "l2t_fast")
