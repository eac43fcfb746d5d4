"""The same meta-gradient by libraries for differentiable optimization, where they are installed.

Both unroll the T matching steps and the step on L_org with a differentiable SGD that begins without momentum, and
differentiate L_meta through it by plain autograd. The losses are those of the reference.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_fast.reference import Reference

MetaGradient = Callable[[Tensor, Tensor], dict[str, Tensor]]


class _Student(nn.Module):
    """Target and projections as one module, so that one optimizer has them both."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.target, self.projections = reference.target, reference.projections

    def forward(self, loss: Callable[[nn.Module, nn.ModuleList], Tensor]) -> Tensor:
        return loss(self.target, self.projections)


def _losses(reference: Reference, x: Tensor, y: Tensor) -> tuple[list[Any], Any]:
    """(those of the simulated steps, L_meta): functions of a target and its projections, for `_Student`."""

    def matching(target: nn.Module, projections: nn.ModuleList) -> Tensor:
        usual = reference.target, reference.projections
        reference.target, reference.projections = target, projections
        try:
            return reference.matching_loss(x, reference.beta)
        finally:
            reference.target, reference.projections = usual

    def task(target: nn.Module, projections: nn.ModuleList) -> Tensor:
        return F.cross_entropy(target(x), y)

    return [matching] * reference.inner_steps + [task], task


def _touch(loss: Tensor, student: nn.Module) -> Tensor:
    """The same loss, of which every parameter has a gradient: weight decay and momentum reach them all."""
    return loss + sum(0.0 * p.sum() for p in student.parameters())


def _pull_back(reference: Reference, meta_loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(reference.phi, torch.autograd.grad(meta_loss, list(reference.phi.values())), strict=True))


def higher_meta_gradient(reference: Reference) -> MetaGradient:
    """By `higher`. Raises ImportError where it is not installed."""
    import higher

    student = _Student(reference)

    def meta_gradient(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        steps, outer = _losses(reference, x, y)
        student.train()
        with higher.innerloop_ctx(student, reference.optimizer) as (functional, optimizer):
            for loss in steps:
                optimizer.step(_touch(functional(loss), functional))
            return _pull_back(reference, functional(outer))

    return meta_gradient


def torchopt_meta_gradient(reference: Reference) -> MetaGradient:
    """By `torchopt.MetaSGD`. Raises ImportError where it is not installed."""
    import torchopt

    student = _Student(reference)
    group = reference.optimizer.param_groups[0]
    settings = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}

    def meta_gradient(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        steps, outer = _losses(reference, x, y)
        student.train()
        optimizer = torchopt.MetaSGD(student, **settings)
        start = torchopt.extract_state_dict(student, by="reference")
        buffers = [buffer.clone() for buffer in student.buffers()]
        try:
            for loss in steps:
                optimizer.step(_touch(student(loss), student))
            return _pull_back(reference, student(outer))
        finally:
            torchopt.recover_state_dict(student, start)
            for buffer, saved in zip(student.buffers(), buffers, strict=True):
                buffer.copy_(saved)

    return meta_gradient
