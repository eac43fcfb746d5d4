"""`step.py` in Triton: a program owns a block of one parameter, reads everything of it once and writes it once."""

# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2t_fast.kernels import launch
from l2t_fast.kernels.sgd.rule import SGD
from l2t_fast.kernels.triton_functions import pick

LIMIT = 96  # parameters of a launch: five pointers of each stay within 4 KiB of kernel parameters
BLOCK = 4096
WARPS = 8


@triton.jit
def _row(programs):
    """(parameter, first element, number of elements of the parameter) of this program."""
    row = programs + tl.program_id(0) * 3
    return tl.load(row), tl.multiple_of(tl.load(row + 1), 16), tl.load(row + 2)


@triton.jit
def _load(x, o, n, WHOLE: tl.constexpr, dtype: tl.constexpr):
    # Unmasked where it may, so that 16 bytes are read at a time.
    value = tl.load(x + o) if WHOLE else tl.load(x + o, mask=o < n, other=0.0)
    return value.to(dtype)


@triton.jit
def _store(x, o, n, value, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(x + o, value)
    else:
        tl.store(x + o, value, mask=o < n)


@triton.jit
def _step_block(
    theta,
    v,
    g,
    new_theta,
    new_v,
    alpha,
    o,
    n,
    WHOLE: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
):
    p = _load(theta, o, n, WHOLE, DTYPE)
    total = p * DECAY
    if GRADIENT:
        total += _load(g, o, n, WHOLE, DTYPE)
    velocity = _load(v, o, n, WHOLE, DTYPE) * MOMENTUM + total
    update = velocity
    if NESTEROV:
        update = total + velocity * MOMENTUM
    _store(new_v, o, n, velocity, WHOLE)
    _store(new_theta, o, n, p - update * alpha, WHOLE)


@triton.jit
def step_kernel(
    theta,
    v,
    g,
    new_theta,
    new_v,
    lr,
    programs,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """θ' and v' of one block of one of N parameters; without GRADIENT, g is not read."""
    i, first, n = _row(programs)
    theta, v, new_theta, new_v = (
        pick(theta, i, 0, N),
        pick(v, i, 0, N),
        pick(new_theta, i, 0, N),
        pick(new_v, i, 0, N),
    )
    if GRADIENT:
        g = pick(g, i, 0, N)
    alpha = tl.load(lr).to(DTYPE)
    o = first + tl.arange(0, BLOCK)  # [BLOCK]
    if first + BLOCK <= n:
        _step_block(theta, v, g, new_theta, new_v, alpha, o, n, True, GRADIENT, MOMENTUM, DECAY, NESTEROV, DTYPE)
    else:
        _step_block(theta, v, g, new_theta, new_v, alpha, o, n, False, GRADIENT, MOMENTUM, DECAY, NESTEROV, DTYPE)


@triton.jit
def _adjoint_block(
    u_theta,
    u_v,
    g_bar,
    alpha,
    o,
    n,
    WHOLE: tl.constexpr,
    GRADIENT: tl.constexpr,
    VELOCITY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
):
    u = _load(u_theta, o, n, WHOLE, DTYPE)
    step = u * alpha
    q = -step * MOMENTUM if NESTEROV else -step
    if VELOCITY:
        q += _load(u_v, o, n, WHOLE, DTYPE)
    total = q - step if NESTEROV else q
    _store(u_theta, o, n, u + total * DECAY, WHOLE)
    _store(u_v, o, n, q * MOMENTUM, WHOLE)
    if GRADIENT:
        _store(g_bar, o, n, total, WHOLE)


@triton.jit
def adjoint_kernel(
    u_theta,
    u_v,
    g_bar,
    lr,
    programs,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
    VELOCITY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """θ̄ and v̄ in place, and with GRADIENT ḡ, of one block of one of N parameters; without VELOCITY u_v counts as 0."""
    i, first, n = _row(programs)
    u_theta, u_v = pick(u_theta, i, 0, N), pick(u_v, i, 0, N)
    if GRADIENT:
        g_bar = pick(g_bar, i, 0, N)
    alpha = tl.load(lr).to(DTYPE)
    o = first + tl.arange(0, BLOCK)  # [BLOCK]
    if first + BLOCK <= n:
        _adjoint_block(u_theta, u_v, g_bar, alpha, o, n, True, GRADIENT, VELOCITY, MOMENTUM, DECAY, NESTEROV, DTYPE)
    else:
        _adjoint_block(u_theta, u_v, g_bar, alpha, o, n, False, GRADIENT, VELOCITY, MOMENTUM, DECAY, NESTEROV, DTYPE)


def step(
    theta: Sequence[Tensor],
    v: Sequence[Tensor],
    g: Sequence[Tensor | None],
    lr: Tensor,
    rule: SGD,
    in_place: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """(θ', v'); see `step.sgd_step`. In place they are θ and v, which must be alike then. θ must be dense."""
    new_theta = list(theta) if in_place else [torch.empty_like(p) for p in theta]
    new_v = list(v) if in_place else [torch.empty_like(p) for p in theta]
    velocities = [_as(x, p) for x, p in zip(v, theta, strict=True)]
    grads = [None if x is None else _as(x, p) for x, p in zip(g, theta, strict=True)]
    for group in _groups(theta, grads):
        lists = {
            name: tuple(tensors[i] for i in group)
            for name, tensors in (("theta", theta), ("v", velocities), ("new_theta", new_theta), ("new_v", new_v))
        }
        _launch(step_kernel, lists | {"g": _gradients(grads, group, lists["theta"])}, lr, rule, grads[group[0]])
    return new_theta, new_v


def adjoint(
    u_theta: Sequence[Tensor],
    u_v: Sequence[Tensor] | None,
    dtypes: Sequence[torch.dtype | None],
    lr: Tensor,
    rule: SGD,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """(ḡ, v̄); see `step.sgd_adjoint_`. u_θ must be dense."""
    v_bar = [torch.empty_like(u) for u in u_theta] if u_v is None else list(u_v)
    g_bar = [None if d is None else torch.empty_like(u, dtype=d) for u, d in zip(u_theta, dtypes, strict=True)]
    for group in _groups(u_theta, g_bar):
        lists = {"u_theta": tuple(u_theta[i] for i in group), "u_v": tuple(v_bar[i] for i in group)}
        lists["g_bar"] = _gradients(g_bar, group, lists["u_theta"])
        _launch(adjoint_kernel, lists, lr, rule, g_bar[group[0]], VELOCITY=u_v is not None)
    return g_bar, v_bar


def _groups(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[list[int]]:
    """Indices of parameters that one launch takes: of one dtype, with gradients of one dtype or none."""
    kinds: dict[Any, list[int]] = {}
    for i, (p, g) in enumerate(zip(tensors, grads, strict=True)):
        if p.numel():
            kinds.setdefault((p.dtype, g.dtype if g is not None else None), []).append(i)
    return [group[k : k + LIMIT] for group in kinds.values() for k in range(0, len(group), LIMIT)]


def _gradients(
    grads: Sequence[Tensor | None], group: Sequence[int], stand_in: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Of the group, or something never read where it has none."""
    chosen = tuple(g for i in group if (g := grads[i]) is not None)
    return chosen or stand_in[:1]


def _launch(
    kernel: Any, lists: dict[str, tuple[Tensor, ...]], lr: Tensor, rule: SGD, gradient: Tensor | None, **flags: bool
) -> None:
    first = next(iter(lists.values()))
    programs = program_table(tuple(p.numel() for p in first), first[0].device)
    arguments = {
        **lists,
        **flags,
        "lr": lr,
        "programs": programs,
        "N": len(first),
        "BLOCK": BLOCK,
        "GRADIENT": gradient is not None,
        "MOMENTUM": rule.momentum,
        "DECAY": rule.weight_decay,
        "NESTEROV": rule.nesterov,
        "DTYPE": tl.float64 if first[0].dtype == torch.float64 else tl.float32,
    }
    launch.launch(kernel, (len(programs),), arguments, programs, WARPS)


@cache  # for good: CUDA graphs hold the tables' addresses
def program_table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[grid, 3] int32: parameter, first element, number of elements of the parameter."""
    rows = [(i, first, n) for i, n in enumerate(sizes) for first in range(0, n, BLOCK)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """x in the order in memory of `like`, which is dense."""
    same = all(a == b for a, b, n in zip(x.stride(), like.stride(), like.shape, strict=True) if n > 1)
    return x if same else torch.empty_like(like, dtype=x.dtype).copy_(x)
