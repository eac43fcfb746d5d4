"""θ's optimizer for whoever wants a `torch.optim.Optimizer`: learning-rate schedules, Lightning, Accelerate."""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from l2t_fast.bounds import check_number
from l2t_fast.engine.state import Trained
from l2t_fast.errors import L2TError

# What torch's optimizers keep in their groups, and an engine does not read there.
_FIXED = ("weight_decay", "momentum", "nesterov", "betas", "eps", "dampening")


class Stepping(Protocol):
    """An engine."""

    trained: Trained

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EngineOptimizer(torch.optim.Optimizer):
    """The parameter groups of θ with their learning rates, which the engine reads before each step.

    `Engine.step` takes the steps, and tells schedules so. `step(closure)` calls the closure, which calls `Engine.step`,
    and returns what it gives; without one it does nothing. The state is the engine's.
    """

    def __init__(self, engine: Stepping, lr: float) -> None:
        theta = list(engine.trained.theta.values())
        groups = engine.trained.update.groups
        self._engine: Stepping | None = None  # groups may still be added
        params = [{"params": [theta[i] for i in group.members], "lr": group.lr.item()} for group in groups]
        super().__init__(params, {"lr": lr})
        self._engine, self._inside, self._taken = engine, False, self.rates()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """What `closure` gives."""
        if closure is None:
            return None
        self._inside = True
        try:
            return closure()
        finally:
            self._inside = False

    def stepped(self) -> None:
        """Called by the engine after a step of its own: to whoever counts, this was one.

        Schedules wrap `step` of the object, others register hooks; where there are neither, nothing is called.
        """
        counted = "step" in vars(self) or self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        if counted and not self._inside:
            self.step()

    def rates(self) -> list[float]:
        """The learning rate of each group.

        Raises:
            L2TError: one is out of its bounds, or something else of a group was set.
        """
        for group in self.param_groups:
            if name := next((name for name in _FIXED if name in group), None):
                raise L2TError(f"the {name} of an engine is fixed: make a new one, and load its state_dict().")
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].item()
            check_number("lr", group["lr"])
        return [float(group["lr"]) for group in self.param_groups]

    def take_over_rates(self) -> None:
        """Lets learning rates that were set in the groups count, where a captured graph reads them."""
        assert self._engine is not None
        rates = self.rates()
        for group, now, before in zip(self._engine.trained.update.groups, rates, self._taken, strict=True):
            if now != before:
                group.lr.fill_(now)
        self._taken = rates

    def set_rates(self, rates: float | list[float]) -> None:
        """The learning rate of each group; of the only one as a number."""
        for options, lr in zip(self.param_groups, rates if isinstance(rates, list) else [rates], strict=True):
            options["lr"] = float(lr)
        self.take_over_rates()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only when the engine is made."""
        if self._engine is not None:
            raise L2TError("the groups of an engine are fixed: give Engine(groups=...) all of them.")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The groups as torch has them, and all of `Engine.state_dict`: a trainer that saves this saves the engine."""
        assert self._engine is not None
        return {**super().state_dict(), "engine": self._engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave.

        Raises:
            L2TError: see `Engine.load_state_dict`.
        """
        assert self._engine is not None
        groups = state_dict.get("param_groups")
        if "engine" not in state_dict or not isinstance(groups, list) or len(groups) != len(self.param_groups):
            raise L2TError("this is not the state of an engine's optimizer: load what its `state_dict` gave.")
        self._engine.load_state_dict(state_dict["engine"])
        for ours, theirs in zip(self.param_groups, groups, strict=True):
            ours.update({name: value for name, value in theirs.items() if name != "params"})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise L2TError("the optimizer of an Engine cannot be copied or pickled: load its state_dict() into a new one.")
