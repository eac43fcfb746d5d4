"""How θ moves along its gradient: clipping, then the rule of each group of parameters; a step and its adjoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2t_fast.bounds import check_number, shown
from l2t_fast.engine.inner_step import Theta
from l2t_fast.errors import L2TError
from l2t_fast.kernels.adamw.rule import AdamW
from l2t_fast.kernels.adamw.step import Moments, adamw_adjoint_, adamw_step
from l2t_fast.kernels.clipping import clip, clip_adjoint, clipped
from l2t_fast.kernels.sgd.rule import SGD
from l2t_fast.kernels.sgd.step import sgd_adjoint_, sgd_step, sgd_step_

Rule = SGD | AdamW
Tensors = list[Tensor]


@dataclass(frozen=True)
class Group:
    """Parameters that have a learning rate and a weight decay of their own."""

    members: list[int]  # their places in θ
    lr: Tensor  # α, a scalar on the device in double: a schedule changes it under a captured graph
    rule: Rule
    follows: bool  # it was given no learning rate of its own


class Kept(NamedTuple):
    """What the adjoint of a step reads of it: ∇ as it came, its norm, the state after the step. SGD's needs none."""

    g: list[Tensor | None]
    norm: Tensor | None
    state: Tensors


@dataclass(frozen=True)
class Update:
    """The step of θ.

    The state is a row of tensors: SGD's v of each parameter; of AdamW m of each, s of each, and t.
    """

    groups: list[Group]  # that with the parameters of no other group first, which may be empty
    max_norm: float | None

    @property
    def rule(self) -> Rule:
        """Of the first group."""
        return self.groups[0].rule

    def described(self) -> tuple[Any, ...]:
        """What it is made of, to be compared."""
        return self.max_norm, [(group.members, group.lr.item(), group.rule) for group in self.groups]

    def start(self, theta: Theta) -> dict[str, Theta]:
        """The state at the beginning, by the names that torch gives its parts."""
        parts = ("momentum",) if isinstance(self.rule, SGD) else ("exp_avg", "exp_avg_sq")
        state = {part: {name: torch.zeros_like(p) for name, p in theta.items()} for part in parts}
        if isinstance(self.rule, AdamW):
            state["steps"] = {"steps": torch.zeros((), device=next(iter(theta.values())).device)}
        return state

    def step(self, theta: Tensors, state: Tensors, g: Sequence[Tensor | None]) -> tuple[Tensors, Tensors, Kept | None]:
        """(θ', state', what `adjoint_` wants). ∇ may be of lower precision than θ, and None, which is zero."""
        if self._plain:
            group = self.groups[0]
            return *sgd_step(theta, state, g, group.lr, group.rule), None  # type: ignore[arg-type]
        given, norm = (list(g), None) if self.max_norm is None else clip(_wide(g, theta), self.max_norm)
        t = [] if isinstance(self.rule, SGD) else [state[-1] + 1]
        rows = [theta, *self._parts(state)]
        after = [list(row) for row in rows]
        for group in self._used:
            _put(after, group, _step(group, _of(rows, group), _of([given], group)[0], t))
        moved, *parts = after
        new_state = [x for part in parts for x in part] + t
        if norm is None and not t:
            return moved, new_state, None
        return moved, new_state, Kept([None if x is None else x.detach() for x in g], norm, new_state if t else [])

    def step_(self, theta: Tensors, state: Tensors, g: Sequence[Tensor | None]) -> None:
        """The same in place."""
        if self._plain:
            group = self.groups[0]
            sgd_step_(theta, state, g, group.lr, group.rule)  # type: ignore[arg-type]
            return
        moved, after, _ = self.step(theta, state, g)
        torch._foreach_copy_([*theta, *state], [*moved, *after])

    def adjoint_(
        self, u_theta: Tensors, u_state: Tensors | None, dtypes: Sequence[torch.dtype | None], kept: Kept | None
    ) -> tuple[list[Tensor | None], Tensors]:
        """The adjoint of `step` in the direction (u_θ, u_state): (ḡ, of the state before); u_θ becomes θ̄ in place.

        u_state: None is zero; else it is used up. dtypes: those of ∇, and so of ḡ; None where there is none.
        """
        if self._plain:
            group = self.groups[0]
            return sgd_adjoint_(u_theta, u_state, dtypes, group.lr, group.rule)  # type: ignore[arg-type]
        nothing: list[Any] = [None] * len(u_theta)
        g = nothing if kept is None else _wide(kept.g, u_theta)
        wide, given = list(dtypes), g
        if kept is not None and kept.norm is not None and self.max_norm is not None:
            wide = [None if d is None else u.dtype for u, d in zip(u_theta, dtypes, strict=True)]
            given = clipped(g, kept.norm, self.max_norm)
        u_parts = [] if u_state is None else self._parts(u_state)
        after, t = (self._parts(kept.state), kept.state[-1:]) if kept is not None and kept.state else ([], [])
        bars = [list(nothing) for _ in range(1 + self._moments)]
        for group in self._used:
            u, of_wide, of_g = _of([u_theta, wide, given], group)
            _put(bars, group, _adjoint_(group, u, _of(u_parts, group), of_wide, _of(after, group), of_g, t))
        bar, *parts = bars
        if kept is not None and kept.norm is not None and self.max_norm is not None:
            bar = clip_adjoint(bar, g, kept.norm, self.max_norm)
        narrow = [None if x is None or d is None else x.to(d) for x, d in zip(bar, dtypes, strict=True)]
        return narrow, [x for part in parts for x in part]

    @property
    def mixes(self) -> bool:
        """Whether θ' of a parameter depends on the gradients of the others."""
        return self.max_norm is not None

    @property
    def _plain(self) -> bool:
        """SGD of all parameters alike, which is one launch."""
        return self.max_norm is None and len(self.groups) == 1 and isinstance(self.rule, SGD)

    @property
    def _used(self) -> list[Group]:
        return [group for group in self.groups if group.members]

    @property
    def _moments(self) -> int:
        return 1 if isinstance(self.rule, SGD) else 2

    def _parts(self, state: Tensors) -> list[Tensors]:
        """v, or m and s, of each parameter."""
        n = len(state) // self._moments  # t at the end of AdamW's is left over
        return [state[k * n : (k + 1) * n] for k in range(self._moments)]


def _of(rows: Sequence[Sequence[Any]], group: Group) -> list[list[Any]]:
    return [[row[i] for i in group.members] for row in rows]


def _put(rows: Sequence[list[Any]], group: Group, values: Sequence[Sequence[Any]]) -> None:
    for row, of_group in zip(rows, values, strict=True):
        for i, value in zip(group.members, of_group, strict=True):
            row[i] = value


def _step(group: Group, rows: list[Tensors], g: list[Tensor | None], t: Tensors) -> list[Tensors]:
    """(θ', moments') of (θ, moments)."""
    theta, *moments = rows
    if isinstance(group.rule, SGD):
        return list(sgd_step(theta, moments[0], g, group.lr, group.rule))
    moved, after = adamw_step(theta, Moments(*moments), g, t[0], group.lr, group.rule)
    return [moved, *after]


def _adjoint_(
    group: Group,
    u: Tensors,
    u_moments: list[Tensors],
    dtypes: list[torch.dtype | None],
    after: list[Tensors],
    g: list[Tensor | None],
    t: Tensors,
) -> list[list[Any]]:
    """(ḡ, of the moments before); u becomes θ̄."""
    if isinstance(group.rule, SGD):
        return list(sgd_adjoint_(u, u_moments[0] if u_moments else None, dtypes, group.lr, group.rule))
    u_both = Moments(*u_moments) if u_moments else None
    g_bar, before = adamw_adjoint_(u, u_both, Moments(*after), g, t[0], group.lr, group.rule)
    return [g_bar, *before]


def _wide(g: Sequence[Tensor | None], theta: Tensors) -> list[Tensor | None]:
    """∇ in the precision of θ."""
    return [None if x is None else x.to(p.dtype) for p, x in zip(theta, g, strict=True)]


def make_update(
    rule: Rule, lr: float, groups: Sequence[Mapping[str, Any]], max_norm: float | None, theta: Theta
) -> Update:
    """groups: as torch.optim takes them, {"params": parameters, "lr": its own, "weight_decay": its own}; all parameters
    in none of them have `lr` and the rule as it is.

    Raises:
        L2TError: a group with other options, or with parameters that are not trained here or stand in another one.
    """
    device = next(iter(theta.values())).device
    places = {id(p): i for i, p in enumerate(theta.values())}
    taken: set[int] = set()
    made: list[Group] = []
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        raise L2TError(f"groups={shown(groups)} is not to be had: give a list of dictionaries, as torch.optim takes.")
    for k, options in enumerate(groups):
        what = f"group {k} of the parameters"
        if not isinstance(options, Mapping) or "params" not in options:
            raise L2TError(f'{what} is {shown(options)}: give {{"params": ..., "lr": ..., "weight_decay": ...}}.')
        if unknown := sorted(map(str, options.keys() - {"params", "lr", "weight_decay"})):
            raise L2TError(f"{what} has '{unknown[0]}': only lr and weight_decay may differ between groups.")
        for name in ("lr", "weight_decay"):
            check_number(name, options.get(name, 0.0))
        members = [places[id(p)] for p in _parameters(options["params"], what) if _trained(p, places, what)]
        if taken & set(members) or len(set(members)) < len(members):
            raise L2TError(f"{what} has a parameter that stands in a group already: give each once.")
        taken |= set(members)
        own = replace(rule, weight_decay=float(options.get("weight_decay", rule.weight_decay)))
        made.append(Group(members, _scalar(options.get("lr", lr), device), own, "lr" not in options))
    rest = [i for i in range(len(theta)) if i not in taken]
    return Update([Group(rest, _scalar(lr, device), rule, True), *made], max_norm)


def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _parameters(given: Any, what: str) -> list[Tensor]:
    """Parameters, or (name, parameter) as of `named_parameters()`; one alone too."""
    given = [given] if isinstance(given, Tensor) else given
    try:
        found = [p[1] if isinstance(p, tuple) else p for p in given]
    except TypeError as error:
        raise L2TError(f"{what} has params={shown(given)}: give a list of parameters.") from error
    if odd := [p for p in found if not isinstance(p, Tensor)]:
        raise L2TError(f"{what} has {shown(odd[0])} among its params: give parameters, not names or modules.")
    return found


def _trained(p: Tensor, places: Mapping[int, int], what: str) -> bool:
    """Whether a parameter learns; one that is frozen may stand in a group, as in torch."""
    if p.requires_grad and id(p) not in places:
        raise L2TError(
            f"{what} has a parameter {list(p.shape)} that the engine does not train: give those of target, projections "
            "and terms (the meta-networks have meta_lr)."
        )
    return p.requires_grad
