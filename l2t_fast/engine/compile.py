"""The steps that an iteration is made of, as they are or compiled."""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from l2t_fast.choices import Scheme
from l2t_fast.engine import inner_step
from l2t_fast.engine.bilevel import Kind, simulated_steps
from l2t_fast.engine.inner_step import Gradient, LossFunction, StepInput, Theta
from l2t_fast.errors import L2TError
from l2t_fast.learner.learner import L2T, Networks

BACKEND = "inductor"  # of torch.compile

Say = Callable[[str], object]  # writes text as it is
Buffers = dict[str, Tensor]  # of the target, by name
Result = TypeVar("Result")


class Matched(NamedTuple):
    """What one batch needs of the sources, once an iteration."""

    S: list[Tensor]  # see `L2T.matching_sources`
    source_of: list[int]
    a: list[Tensor]  # [B, C_s] of each pair, with its graph to φ
    lam: list[Tensor]  # λ [B] of each pair
    kept: list[list[Tensor]]  # what each term keeps of the sources


@dataclass(frozen=True)
class Steps:
    """What an iteration is made of.

    source_pass(x, `L2T.resizes`(x)); gradient(kind, simulated, θ, batch, buffers) of L_org + L_wfm as `kind` says;
    task_loss(θ, x, y, buffers). functional: the real step, too, wants the target's buffers, and gives back new ones.
    """

    source_pass: Callable[[Tensor, bool], Matched]
    gradient: Callable[[Kind, bool, Theta, StepInput, Buffers], Gradient]
    task_loss: Callable[[Theta, Tensor, Tensor, Buffers], Tensor]
    functional: bool = False


def plain_steps(
    learner: L2T, beta: float, networks: Networks | None = None, loss: LossFunction = F.cross_entropy
) -> Steps:
    """Each operation as PyTorch runs it."""
    of_all: dict[str, Any] = {"networks": networks, "loss_function": loss}

    def source_pass(x: Tensor, resized: bool) -> Matched:
        S, kept = learner.source_pass(x, networks)
        return Matched(*learner.matching_sources(S, resized), *learner.coefficients(S, beta), kept)

    def gradient(kind: Kind, simulated: bool, theta: Theta, batch: StepInput, buffers: Buffers) -> Gradient:
        of_kind: dict[str, Any] = {"task": kind.task, "matching": kind.matching, "simulated": simulated}
        return inner_step.gradient(learner, theta, batch, **of_kind, **of_all, buffers=buffers)

    def task_loss(theta: Theta, x: Tensor, y: Tensor, buffers: Buffers) -> Tensor:
        return inner_step.task_loss(learner, theta, x, y, **of_all, buffers=buffers)

    return Steps(source_pass, gradient, task_loss)


def compiled_steps(
    learner: L2T, beta: float, units: Sequence[str], say: Say, loss: LossFunction = F.cross_entropy
) -> Steps:
    """Each step on the traced networks through torch.compile, once for each of the `units` that it is called for.

    The unit is one inner step, never the unrolled iteration: the cost does not grow with T. The step's adjoint is the
    compiled backward. The first call of a unit compiles and tells `say` how far it is.

    Raises:
        L2TError: networks that cannot be traced; in a first call, where PyTorch cannot compile the unit.
    """
    steps = plain_steps(learner, beta, learner.traced_networks(), loss)
    made: dict[str, Callable[..., Any]] = {}

    def run(unit: str, function: Callable[..., Result], *arguments: Any) -> Result:
        if unit in made:
            return made[unit](*arguments)  # type: ignore[no-any-return]
        say(f"compiling {unit} {len(made) + 1}/{len(units)} ...")
        start = perf_counter()
        try:
            attempt = torch.compile(_own_code(function), fullgraph=True, dynamic=False, backend=BACKEND)
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):  # the adjoint at once
                result: Result = attempt(*arguments)
        except L2TError:
            raise
        except Exception as error:  # whatever a compiler may raise
            say(" failed\n")
            reason = " ".join(str(error).split("\n")[:2])[:200]  # the second line names what the backend raised
            raise L2TError(
                f"torch.compile cannot compile the {unit} ({type(error).__name__}: {reason}): use another mode."
            ) from error
        say(f" {perf_counter() - start:.0f} s\n")
        made[unit] = attempt
        return result

    def gradient(kind: Kind, simulated: bool, theta: Theta, batch: StepInput, buffers: Buffers) -> Gradient:
        def of_kind(theta: Theta, batch: StepInput, buffers: Buffers) -> Gradient:
            return steps.gradient(kind, simulated, theta, batch, buffers)

        first = not any(p.requires_grad for p in theta.values())
        return run(unit_of(kind, simulated, first), of_kind, theta, batch, buffers)

    return Steps(
        lambda x, resized: run(SOURCES, steps.source_pass, x, resized),
        gradient,
        lambda theta, x, y, buffers: run(OUTER, steps.task_loss, theta, x, y, buffers),
        functional=True,
    )


def shapes_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What steps are compiled for."""
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


SOURCES, OUTER = "source features", "meta loss"


def unit_of(kind: Kind, simulated: bool, first: bool) -> str:
    """What a step is called; the first simulated one, whose θ is a constant, is compiled by itself."""
    if not simulated:
        return "real step"
    name = "simulated step" if kind.task and kind.matching else "task step" if kind.task else "matching step"
    return f"first {name}" if first else name


def units_of(scheme: Scheme, inner_steps: int, sources: bool, meta: bool) -> list[str]:
    """What `compiled_steps` compiles for an iteration, in order."""
    steps = simulated_steps(scheme, 1, min(inner_steps, 2)) if meta else []
    names = [unit_of(kind, True, first=t == 0) for t, kind in enumerate(steps)]
    return [*([SOURCES] if sources else []), "real step", *dict.fromkeys(names), *([OUTER] if meta else [])]


def _own_code(function: Callable[..., Result]) -> Callable[..., Result]:
    """A copy with a code object of its own: what Dynamo compiled, and its limit of recompilations, belong to that."""
    assert isinstance(function, types.FunctionType)
    copied = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
