"""What the Gram form of the matching operators gains (kernels/matching/gram.py), and its digits, layer by layer.

Errors against float64 stand beside those of the direct form in ATen in float32: of random features, and of projections
that are nearly right, where d is 10 % and 1 % of r T, as after some training. "gram float32" computes in float32 and
"gram float64" in float64, conversions included. The engine admits no error beyond 1.2 times PyTorch's: `admitted`; and
`chosen` says whether the engine matches this layer so, on a CPU in float32.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.contenders.operators import TOLERANCE, Problem, error_ratio, errors, formulas, random_problem
from benchmarks.measure import timing
from benchmarks.measure.capture import Outputs
from benchmarks.measure.rates import set_precision
from benchmarks.rows import Row, add_row_arguments, append, begin, say
from benchmarks.shapes import MATCHING_SHAPES
from l2t_fast import Engine
from l2t_fast.kernels.matching import aten, gram

OPERATORS = ("gradient", "adjoint")
SMALL = (None, 1e-1, 1e-2)  # |d| / |r T|; None: of random features
FORMS = {"direct": None, "gram float32": torch.float32, "gram float64": torch.float64}


def layer_problem(case: str, layer: int, batch: int, small: float | None, device: torch.device) -> Problem:
    """All pairs of a target layer.

    For a small d the features vary little about a mean of their own, which the projections meet: so R(S) can follow
    r T at every resolution.
    """
    whole = random_problem(case, "fp32", device)
    pairs = [p for p, n in enumerate(whole.target_of) if n == layer]
    T = whole.targets[layer][:batch]
    S = [whole.sources[whole.source_of[p]][:batch] for p in pairs]
    r, bias = [whole.projections[p] for p in pairs], [whole.biases[p] for p in pairs]
    if small is not None:
        mean = T.mean((2, 3), keepdim=True).sign() + 1.5  # [B, C_t, 1, 1]
        T = mean + small * T
        S = [F.conv2d(mean, r_p, b_p) + small * S_p for S_p, r_p, b_p in zip(S, r, bias, strict=True)]
    return replace(
        whole,
        targets=[T],
        sources=S,
        projections=r,
        biases=bias,
        coefficients=[whole.coefficients[p][:batch] for p in pairs],
        u_targets=[whole.u_targets[layer][:batch]],
        u_projections=[whole.u_projections[p] for p in pairs],
        u_biases=[whole.u_biases[p] for p in pairs],
        source_of=list(range(len(pairs))),
        target_of=[0] * len(pairs),
    )


def in_form(form: torch.dtype | None, problem: Problem, operator: str) -> Outputs:
    """By ATen, directly or in the Gram form, computed in the dtype `form`."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(gram, "pays", return_value=form is not None))
        stack.enter_context(mock.patch.object(gram, "WIDER", {problem.targets[0].dtype: form}))
        return formulas(aten, problem, operator)


def layer_rows(case: str, layer: int, batch: int, rounds: int, device: torch.device) -> list[Row]:
    """A row for each operator, size of d and form."""
    rows = []
    for small in SMALL:
        problem = layer_problem(case, layer, batch, small, device)
        shapes = problem.targets[0].shape, [S.shape for S in problem.sources]
        for operator in OPERATORS:
            forms: dict[str, Callable[[], Outputs]] = {
                name: partial(in_form, form, problem, operator) for name, form in FORMS.items()
            }
            exact: list[list[Tensor]] = in_form(None, problem.double(), operator)
            error = {name: errors(operator, form(), exact) for name, form in forms.items()}
            times = timing.milliseconds(forms, rounds, device)
            for name in forms:
                ratio = error_ratio(error[name], error["direct"])
                row = {"kind": "gram", "case": case, "target": MATCHING_SHAPES[case][2][layer], "batch": batch}
                row |= {"operator": operator, "d_over_rT": small, "by": name, **timing.summary(times[name])}
                row |= {"error": error[name], "error_over_direct": ratio, "admitted": ratio <= TOLERANCE}
                row |= {f"{key}_over_direct": x for key, x in timing.speedup(times["direct"], times[name]).items()}
                rows.append(row | {"chosen": name == ("gram float64" if gram.pays(*shapes) else "direct")})
    return rows


def iteration_rows(case: str, batch: int, rounds: int, device: torch.device) -> list[Row]:
    """A row for the engine as it is, and one with every layer in the direct form, turn by turn."""
    small = replace(CASES[case], batch=batch)
    x, y = small.images(0, device, torch.float32)

    def engine() -> Engine:
        return Engine(
            small.learner(device, torch.float32), mode="eager", precision="fp32", inner_steps=small.inner_steps
        )

    def directly(call: Callable[[], Any]) -> Any:
        with mock.patch.object(gram, "pays", return_value=False):
            return call()

    ours, direct = engine(), directly(engine)
    forms = {"direct": partial(directly, partial(direct.step, x, y)), "engine": partial(ours.step, x, y)}
    times = timing.milliseconds(forms, rounds, device)
    return [
        {"kind": "gram", "case": case, "batch": batch, "operator": "iteration", "by": name}
        | timing.summary(times[name])
        | {f"{key}_over_direct": value for key, value in timing.speedup(times["direct"], times[name]).items()}
        for name in forms
    ]


def show(row: Row) -> None:
    """One line of the table."""
    if row["operator"] == "iteration":
        return say(f"{row['case']} iteration", [row["by"], "", f"{row['speedup_over_direct']:.2f}"])
    title = f"{row['case']} {'x'.join(map(str, row['target']))} {row['operator']}"
    small = "random" if row["d_over_rT"] is None else f"{row['d_over_rT']:g}"
    cells = [row["by"], small, *(f"{row[name]:.2f}" for name in ("speedup_over_direct", "error_over_direct"))]
    return say(title, [*cells, *([] if row["admitted"] else ["inexact"]), *(["chosen"] if row["chosen"] else [])])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("--cases", nargs="+", choices=MATCHING_SHAPES, default=["imagenet", "cifar"])
    parser.add_argument("--batch", type=int, default=4, help="images of a batch (default 4)")
    parser.add_argument("--iterations", type=int, default=0, help="timed turns of whole iterations (default 0)")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each form (default 7)")


def run(arguments: argparse.Namespace) -> None:
    device = begin("gram", arguments)
    set_precision("fp32")
    say("", ["form", "d / r T", "speed", "error"])
    for case in arguments.cases:
        for layer in range(len(MATCHING_SHAPES[case][2])):
            for row in layer_rows(case, layer, arguments.batch, arguments.rounds, device):
                append(arguments.output, row)
                show(row)
        for row in iteration_rows(case, arguments.batch, arguments.iterations, device) if arguments.iterations else ():
            append(arguments.output, row)
            show(row)
