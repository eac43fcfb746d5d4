"""What an engine trains, and its state as tensors, numbers and dictionaries."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from l2t_fast.engine.inner_step import Theta
from l2t_fast.engine.update import Rule, Update
from l2t_fast.errors import L2TError
from l2t_fast.learner.learner import L2T


@dataclass
class Trained:
    """θ with its optimizer and the state of that, φ with its Adam."""

    theta: Theta
    state: dict[str, Theta]  # see `Update.start`
    phi: Theta
    update: Update
    adam: torch.optim.Adam | None  # none without φ
    adam_options: dict[str, Any] = field(default_factory=dict)  # those of the device

    @classmethod
    def of(cls, learner: L2T, theta: Theta, update: Update, meta_lr: float, meta_weight_decay: float) -> "Trained":
        """Everything at its start: no momentum, no moments."""
        device = next(iter(theta.values())).device
        phi: Theta = {
            **{f"what.{name}": p for name, p in learner.what.named_parameters() if p.requires_grad},
            **{f"where.{name}": p for name, p in learner.where.named_parameters() if p.requires_grad},
        }
        options: dict[str, Any] = (
            {"lr": torch.tensor(meta_lr, dtype=torch.float32, device=device), "fused": True, "capturable": True}
            if device.type == "cuda"
            else {"lr": float(meta_lr), "fused": None, "capturable": False}
        )
        adam = torch.optim.Adam(phi.values(), weight_decay=meta_weight_decay, **options) if phi else None
        if adam is not None:  # it runs uncaptured first, and says so otherwise
            adam._warned_capturable_if_run_uncaptured = True
        return cls(theta, update.start(theta), phi, update, adam, options)

    @property
    def momentum(self) -> Theta:
        """v of SGD."""
        return self.state["momentum"]

    @property
    def rule(self) -> Rule:
        """Of θ."""
        return self.update.rule

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return next(iter(self.theta.values())).device

    def row(self) -> list[Tensor]:
        """The state of θ's optimizer as `Update` takes it."""
        return [tensor for part in self.state.values() for tensor in part.values()]

    def set_meta_lr(self, value: float) -> None:
        """The learning rate of Adam, in place where a captured graph reads it."""
        for group in self.adam.param_groups if self.adam is not None else ():
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def groups(self, learner: L2T) -> dict[str, dict[str, Tensor]]:
        """All tensors that an iteration changes but for Adam's, by group and name; the engine's own."""
        return {
            "theta": {name: p.detach() for name, p in self.theta.items()},
            **{part: dict(tensors) for part, tensors in self.state.items()},
            "buffers": dict(learner.target.named_buffers()),
            "phi": {name: p.detach() for name, p in self.phi.items()},
        }

    def adam_state(self, meta_lr: float) -> dict[str, Any]:
        """Adam's state, the same on every device: its learning rate as a number."""
        if self.adam is None:
            return {}
        state: dict[str, Any] = self.adam.state_dict()
        for group in state["param_groups"]:
            group["lr"] = meta_lr
        return state

    def load(self, state: Any, learner: L2T) -> tuple[float | None, bool]:
        """Puts back all but θ's learning rates: (that of φ's Adam, whether its moments are where they were before).

        Raises:
            L2TError: a state of another learner or of something else; nothing is changed then.
        """
        groups = self.groups(learner)
        check_fits(state, groups, len(self.update.groups))
        meta_lr, in_place = (None, True) if self.adam is None else self.load_adam(state["adam"])
        with torch.no_grad():
            for group, tensors in groups.items():
                for name, tensor in tensors.items():
                    tensor.copy_(state[group][name])
        return meta_lr, in_place

    def load_adam(self, state: Any) -> tuple[float, bool]:
        """Puts Adam's state back; (its learning rate, whether all moments are where they were before).

        Raises:
            L2TError: a state of another optimizer; nothing is changed then.
        """
        assert self.adam is not None
        _check_moments(state, list(self.phi.values()))
        theirs = copy.deepcopy(state)  # Adam would keep the tensors it is given
        before = dict(self.adam.state)
        try:
            meta_lr = float(theirs["param_groups"][0]["lr"])
            for group in theirs["param_groups"]:
                group |= self.adam_options  # those of this device
            self.adam.load_state_dict(theirs)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise L2TError("this state does not fit the learner: its 'adam' is of another optimizer.") from error
        for options in self.adam.param_groups:
            options["lr"] = self.adam_options["lr"]  # loading makes a copy, which no captured graph reads
        return meta_lr, self._keep_places(before)

    def _keep_places(self, before: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Puts Adam's loaded state where it was `before`, where captured graphs write it."""
        assert self.adam is not None
        for p, moments in before.items():
            loaded = self.adam.state.get(p)
            if loaded is None or loaded.keys() != moments.keys():  # a state from before the first step
                return False
            for name, tensor in moments.items():
                tensor.copy_(loaded[name])
            self.adam.state[p] = moments
        return True


def check_fits(state: Any, groups: Mapping[str, Mapping[str, Tensor]], rates: int) -> None:
    """Raises L2TError for a state of another learner, or of something else; `rates`: its learning rates."""
    if isinstance(state, dict) and {"theta", "lr"} <= state.keys() and ("momentum" in state) != ("momentum" in groups):
        raise L2TError("this state does not fit the learner: it is of another optimizer; make the engine with it.")
    if not isinstance(state, dict) or state.keys() != {*groups, "adam", "lr"}:
        raise L2TError("this is not the state of an engine: load what `state_dict` gave.")
    for group, tensors in groups.items():
        theirs = state.get(group)
        if not isinstance(theirs, dict) or theirs.keys() != tensors.keys():
            raise L2TError(
                f"this state does not fit the learner: its '{group}' has other names; load it where it was made."
            )
        for name, tensor in tensors.items():
            shape = list(theirs[name].shape) if isinstance(theirs[name], Tensor) else theirs[name]
            if shape != list(tensor.shape):
                raise L2TError(
                    f"this state does not fit the learner: '{name}' is {shape}, not {list(tensor.shape)}; load it "
                    "where it was made."
                )
            other_kind = theirs[name].is_floating_point() != tensor.is_floating_point()
            if other_kind or theirs[name].is_meta or theirs[name].layout != torch.strided:
                what = f"{theirs[name].dtype}, {theirs[name].layout}, on {theirs[name].device}"
                raise L2TError(f"this state does not fit the learner: '{name}' is {what}; load it where it was made.")
    lrs = state["lr"] if rates > 1 else [state["lr"]]
    if not isinstance(lrs, list) or len(lrs) != rates or not all(isinstance(lr, (int, float)) for lr in lrs):
        raise L2TError(f"this state is not that of an engine: its learning rate is {state['lr']!r}.")


def _check_moments(state: Any, phi: Sequence[Tensor]) -> None:
    """The moments belong to φ, or there are none yet."""
    moments = state.get("state", {}) if isinstance(state, dict) else {}
    for i, moment in moments.items():
        whole = isinstance(moment, dict) and moment.keys() == {"step", "exp_avg", "exp_avg_sq"}
        if not whole or not 0 <= i < len(phi) or not all(isinstance(m, Tensor) for m in moment.values()):
            raise L2TError("this state is not that of an engine: its 'adam' holds something else.")
        if any(moment[n].shape != phi[i].shape for n in ("exp_avg", "exp_avg_sq")):
            raise L2TError("this state does not fit the learner: its 'adam' is of other meta-networks.")
        if bool((moment["step"] < 0).any()) or bool((moment["exp_avg_sq"] < 0).any()):
            raise L2TError("this state is not that of an engine: its 'adam' counts or squares to less than nothing.")
