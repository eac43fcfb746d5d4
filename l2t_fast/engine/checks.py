"""What is looked at before anything runs: settings, batches, and what has become of the target."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from l2t_fast.bounds import check_number, shown
from l2t_fast.choices import Memory, Mode, Precision, Scheme
from l2t_fast.engine.inner_step import parameters
from l2t_fast.engine.loss import Loss
from l2t_fast.engine.update import Rule
from l2t_fast.errors import L2TError
from l2t_fast.kernels.adamw.rule import AdamW
from l2t_fast.kernels.sgd.rule import SGD
from l2t_fast.learner.learner import L2T

Images = Tensor | Sequence[Tensor]


def check_settings(words: Mapping[str, str], numbers: Mapping[str, Any], nesterov: bool) -> None:
    """Raises L2TError for a word that is no choice, or a number out of range."""
    for name, choices in (("scheme", Scheme), ("mode", Mode), ("precision", Precision), ("memory", Memory)):
        if words[name] not in get_args(choices):
            allowed = " or ".join(map(repr, get_args(choices)))
            raise L2TError(f"{name}={shown(words[name])} is not to be had: use {allowed}.")
    for name, value in numbers.items():
        check_number(name, value)
    if nesterov and not numbers["momentum"]:
        raise L2TError("nesterov=True needs momentum > 0.")


def choose_rule(rule: Any, momentum: float, weight_decay: float, nesterov: bool) -> Rule:
    """The rule that θ moves by: that given, or SGD.

    Raises:
        L2TError: it is none, its numbers are out of bounds, or those of SGD are given beside it.
    """
    usual = SGD()
    if rule is None:
        return SGD(momentum, weight_decay, nesterov)
    if (momentum, weight_decay, nesterov) != (usual.momentum, usual.weight_decay, usual.nesterov):
        raise L2TError("optimizer= has its own momentum, weight_decay and nesterov: say them there.")
    if isinstance(rule, SGD):
        numbers = {"momentum": rule.momentum, "weight_decay": rule.weight_decay}
        if rule.nesterov and not rule.momentum:
            raise L2TError("nesterov=True needs momentum > 0.")
    elif isinstance(rule, AdamW) and isinstance(rule.betas, tuple) and len(rule.betas) == 2:
        numbers = {"beta1": rule.betas[0], "beta2": rule.betas[1], "eps": rule.eps, "weight_decay": rule.weight_decay}
    else:
        raise L2TError(f"optimizer={shown(rule)} is not to be had: use l2t_fast.SGD(...) or l2t_fast.AdamW(...).")
    for name, value in numbers.items():
        check_number(name, value)
    chosen: Rule = rule
    return chosen


def check_target(learner: L2T, theta: Mapping[str, Tensor]) -> None:
    """Raises L2TError where the target has no longer the parameters θ that its engine was made with."""
    now = parameters(learner)
    anew = "make a new Engine, whose load_state_dict takes over what it can"
    for name, p in theta.items():
        if name not in now:
            p_now = dict(learner.named_parameters()).get(name)
            what = "taken away" if p_now is None else "replaced" if p_now is not p else "frozen"
            raise L2TError(f"parameter '{name}' was {what} after the engine was made: {anew}.")
        if now[name] is not p:
            raise L2TError(f"parameter '{name}' was replaced after the engine was made: {anew}.")
        if p._post_accumulate_grad_hooks:
            raise L2TError(
                f"parameter '{name}' has a hook for accumulated gradients, and an engine accumulates none: use "
                "register_hook."
            )
    if len(now) > len(theta):
        name = next(name for name in now if name not in theta)
        raise L2TError(f"parameter '{name}' requires a gradient since the engine was made: {anew}.")


def smallest_batch(target: nn.Module) -> int:
    """2 where a BatchNorm takes the statistics of the batch, else 1."""
    norms = (m for m in target.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return 2 if any(m.training for m in norms) else 1


def batches_in_a_row(
    x: Images, y: Images, val: tuple[Tensor, Tensor] | None, scheme: Scheme, inner_steps: int, meta: bool
) -> list[tuple[Tensor, Tensor]]:
    """The batches, and then L_meta's own; without `meta` only the first is read.

    Raises:
        L2TError: their number does not fit the scheme.
    """
    xs, ys = _tensors(x, "x"), _tensors(y, "y")
    if len(xs) != len(ys) or not xs:
        raise L2TError(f"there are {len(xs)} batches of images but {len(ys)} of labels: give one for each.")
    if len(xs) > 1 and scheme == "transfer":
        raise L2TError("scheme='transfer' takes one batch at a time: give x and y as tensors.")
    if scheme == "simulation":
        if val is None and meta:
            raise L2TError("scheme='simulation' measures L_meta on held-out data: give val=(images, labels).")
        if len(xs) not in (1, inner_steps):
            raise L2TError(f"there are {len(xs)} batches for {inner_steps} inner steps: give one each, or one for all.")
    if val is not None and len(_tensors(val, "val")) != 2:
        raise L2TError("val must be (images, labels).")
    return [*zip(xs, ys, strict=True), *([val] if val is not None else [])]


def _tensors(given: Any, name: str) -> list[Tensor]:
    found = [given] if isinstance(given, Tensor) else given
    if not isinstance(found, list | tuple) or not all(isinstance(one, Tensor) for one in found):
        raise L2TError(
            f"{name} must be a tensor, or a list of them, not {shown(given)}: give images [B, C, H, W] and labels [B]."
        )
    return list(found)


def trained_parameter(learner: Any, precision: Precision) -> Tensor:
    """A parameter of the learner's target that is trained.

    Raises:
        L2TError: it is no learner, it has nothing to train, or parameters of another dtype than the precision needs.
    """
    if not isinstance(learner, L2T):
        raise L2TError(f"an Engine needs an L2T, not {type(learner).__name__}: make one of your networks.")
    found = next((p for p in learner.target.parameters() if p.requires_grad), None)
    if found is None:
        raise L2TError("the target has no parameter to train: set requires_grad of those that shall learn.")
    if precision != "fp32" and found.dtype != torch.float32:
        raise L2TError(f"precision='{precision}' needs float32 networks, not {found.dtype}: use 'fp32'.")
    return found


def check_batch(
    x: Tensor, y: Tensor, like: Tensor, smallest: int, learner: L2T, loss: Loss, look_at_labels: bool
) -> None:
    """Raises L2TError for images and labels that do not fit each other, or a target with parameters `like`."""
    places = (like.device, torch.device("cpu"))
    if x.dim() != 4:
        raise L2TError(f"the images must be [B, C, H, W], not {list(x.shape)}.")
    if x.shape[1] != (channels := learner.image_shape[0]):
        raise L2TError(
            f"the images have {x.shape[1]} channels, those that the learner was made for {channels}: give [B, "
            f"{channels}, H, W]."
        )
    if x.layout != torch.strided:
        raise L2TError(f"the images are {x.layout}: give them as x.to_dense().")
    if x.device not in places or x.dtype != like.dtype:
        raise L2TError(
            f"the images are {x.dtype} on {x.device}, the target is {like.dtype} on {like.device}: "
            "move them to the same device and dtype."
        )
    if y.device not in places or not _are_labels(x, y, like, learner.target_network.output_shape, loss):
        size = f"[{x.shape[0]}]" if len(learner.target_network.output_shape) == 1 else f"[{x.shape[0]}, ...]"
        wanted = f"int64 of shape {size}" if loss.classes else f"of shape [{x.shape[0]}, ...]"
        soft = f" (or probabilities of the classes, {like.dtype})" if loss.classes else ""
        raise L2TError(
            f"the labels must be {wanted} on {x.device}, one an image{soft}, not {y.dtype} {list(y.shape)} on "
            f"{y.device}."
        )
    if not len(x):
        raise L2TError("the batch is empty: give images and labels.")
    if x.shape[0] < smallest:
        raise L2TError("BatchNorm cannot train on a batch of one: give two images or more.")
    if loss.classes and not y.is_floating_point() and (y.device.type == "cpu" or look_at_labels):
        counted = y if loss.ignored is None else y[y != loss.ignored]
        if not len(counted):
            raise L2TError(f"all labels are {loss.ignored}, which the loss ignores: give some that count.")
        low, high = counted.min().item(), counted.max().item()
        if low < 0 or high >= learner.classes:
            raise L2TError(
                f"the labels go from {low} to {high}, but the target has classes 0 to {learner.classes - 1}."
            )


def _are_labels(x: Tensor, y: Tensor, like: Tensor, output_shape: tuple[int, ...], loss: Loss) -> bool:
    """Whether y is of a shape and dtype that the loss may take; of others than cross entropy its trial says more."""
    if not loss.classes:
        return y.shape[:1] == x.shape[:1]
    if y.is_floating_point():  # probabilities of the classes
        return y.dtype == like.dtype and y.dim() == 1 + len(output_shape) and y.shape[:2] == (len(x), output_shape[0])
    return y.dtype == torch.int64 and y.dim() == len(output_shape) and y.shape[:1] == x.shape[:1]
