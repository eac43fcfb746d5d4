"""What is looked at before anything runs: settings, batches, and what has become of the target."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from l2t_fast.bounds import check_number, shown
from l2t_fast.choices import Memory, Mode, Precision, Scheme
from l2t_fast.engine.inner_step import parameters
from l2t_fast.errors import L2TError
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


def check_learner(learner: Any) -> None:
    """Raises L2TError where it is none, or has nothing to train."""
    if not isinstance(learner, L2T):
        raise L2TError(f"an Engine needs an L2T, not {type(learner).__name__}: make one of your networks.")
    if not any(p.requires_grad for p in learner.target.parameters()):
        raise L2TError("the target has no parameter to train: set requires_grad of those that shall learn.")


def check_batch(x: Tensor, y: Tensor, like: Tensor, smallest: int, learner: L2T, look_at_labels: bool) -> None:
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
    if y.shape != x.shape[:1] or y.dtype != torch.int64 or y.device not in places:
        raise L2TError(
            f"the labels must be int64 of shape [{x.shape[0]}] on {x.device}, one an image, "
            f"not {y.dtype} {list(y.shape)} on {y.device}."
        )
    if not len(x):
        raise L2TError("the batch is empty: give images and labels.")
    if x.shape[0] < smallest:
        raise L2TError("BatchNorm cannot train on a batch of one: give two images or more.")
    if y.device.type == "cpu" or look_at_labels:
        low, high = y.min().item(), y.max().item()
        if low < 0 or high >= learner.classes:
            raise L2TError(
                f"the labels go from {low} to {high}, but the target has classes 0 to {learner.classes - 1}."
            )
