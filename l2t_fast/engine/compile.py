"""The functions that an iteration is made of, as they are or compiled."""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from l2t_fast.choices import Scheme
from l2t_fast.engine import inner_step as inner
from l2t_fast.engine.bilevel import Kind, simulated_steps
from l2t_fast.engine.inner_step import Batch, Gradient, Theta
from l2t_fast.errors import L2TError
from l2t_fast.learner.learner import L2T

BACKEND = "inductor"  # of torch.compile

Say = Callable[[str], object]  # writes text as it is
Result = TypeVar("Result")


class Prepared(NamedTuple):
    """What one batch needs once an iteration."""

    S: list[Tensor]  # see `L2T.matching_sources`
    source_of: list[int]
    a: list[Tensor]  # [B, C_s] of each pair, with its graph to φ
    lam: list[Tensor]  # λ [B] of each pair
    given: list[list[Tensor]]  # what each term keeps of the sources


@dataclass(frozen=True)
class Functions:
    """prepare(x, `L2T.resizes`(x)); gradient(kind, simulated, θ, batch) of L_org + L_wfm as `kind` says;
    task_loss(θ, x, y)."""

    prepare: Callable[[Tensor, bool], Prepared]
    gradient: Callable[[Kind, bool, Theta, Batch], Gradient]
    task_loss: Callable[[Theta, Tensor, Tensor], Tensor]


def plain(learner: L2T, beta: float) -> Functions:
    """Each operation as PyTorch runs it."""

    def prepare(x: Tensor, resized: bool) -> Prepared:
        S, given = learner.prepare(x)
        return Prepared(*learner.matching_sources(S, resized), *learner.cotangents(S, beta), given)

    def gradient(kind: Kind, simulated: bool, theta: Theta, batch: Batch) -> Gradient:
        return inner.gradient(learner, theta, batch, task=kind.task, matching=kind.matching, simulated=simulated)

    def task_loss(theta: Theta, x: Tensor, y: Tensor) -> Tensor:
        return inner.task_loss(learner, theta, x, y)

    return Functions(prepare, gradient, task_loss)


def compiled(functions: Functions, units: Sequence[str], say: Say) -> Functions:
    """Each function through torch.compile, once for each of the `units` that it is called for.

    The unit is one inner step, never the unrolled iteration: the cost does not grow with T. The step's adjoint is the
    compiled backward. The first call of a unit compiles and tells `say` how far it is.

    Raises:
        L2TError: in a first call, where PyTorch cannot compile the unit.
    """
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

    def gradient(kind: Kind, simulated: bool, theta: Theta, batch: Batch) -> Gradient:
        def of_kind(theta: Theta, batch: Batch) -> Gradient:
            return functions.gradient(kind, simulated, theta, batch)

        first = not any(p.requires_grad for p in theta.values())
        return run(name_of(kind, simulated, first), of_kind, theta, batch)

    return Functions(
        lambda x, resized: run(SOURCES, functions.prepare, x, resized),
        gradient,
        lambda theta, x, y: run(OUTER, functions.task_loss, theta, x, y),
    )


SOURCES, OUTER = "source features", "meta loss"


def name_of(kind: Kind, simulated: bool, first: bool) -> str:
    """What a step is called; the first simulated one, whose θ is a constant, is compiled by itself."""
    if not simulated:
        return "real step"
    name = "simulated step" if kind.task and kind.matching else "task step" if kind.task else "matching step"
    return f"first {name}" if first else name


def units(scheme: Scheme, inner_steps: int, sources: bool, meta: bool) -> list[str]:
    """What `compiled` compiles for an iteration, in order."""
    steps = simulated_steps(scheme, 1, min(inner_steps, 2)) if meta else []
    names = [name_of(kind, True, first=t == 0) for t, kind in enumerate(steps)]
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
