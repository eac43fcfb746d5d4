"""What a method may add to L_total beside cross entropy and matching loss."""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from l2t_fast.learner.network import Outputs
from l2t_fast.learner.pairs import Shape


class Shapes(NamedTuple):
    """What one network gives: (C, H, W) of its tapped layers, its classes, the channels that its last Linear reads."""

    layers: tuple[Shape, ...]
    classes: int
    hidden: int  # 0: the network does not end in a Linear


class TermNetworks(NamedTuple):
    """What a term is made of."""

    sources: tuple[Shapes, ...]
    target: Shapes


class Term(nn.Module):
    """A term of L_total. Its parameters, if it has any, belong to θ: they are trained with the target.

    It enters where L_total does: in the real step, and in the simulated ones of scheme "simulation".
    """

    name: ClassVar[str]  # its value is logged as NAME_loss; its settings are called NAME.SETTING

    def prepare(self, x: Tensor, sources: Sequence[Outputs], run: Callable[[int, Tensor], Outputs]) -> list[Tensor]:
        """What the term keeps of the sources for images x [B, C, H, W]: once an iteration, without gradient.

        run(s, x): source s once more, for a term that differentiates it.
        """
        raise NotImplementedError

    def forward(self, given: list[Tensor], x: Tensor, target: Outputs, run: Callable[[Tensor], Outputs]) -> Tensor:
        """The term, weighted: a scalar, differentiable in the target's outputs and in the term's parameters.

        given: from `prepare`. run(x): the target once more, for a term that differentiates it.
        """
        raise NotImplementedError


MakeTerm = Callable[[TermNetworks], Term]


def input_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂f/∂x of a scalar f, differentiable itself: for terms that differentiate a network."""
    if torch.compiler.is_compiling():  # Dynamo follows this form alone
        return torch.func.grad(f)(x)  # type: ignore[no-any-return]
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return torch.autograd.grad(f(z), z, create_graph=differentiable)[0]
