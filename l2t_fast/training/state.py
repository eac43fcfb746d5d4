"""Where a training stands: what its checkpoint holds, and what may go into one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l2t_fast.engine.engine import Engine
from l2t_fast.errors import L2TError
from l2t_fast.files import load_checkpoint
from l2t_fast.learner.generators import read_torch, set_torch
from l2t_fast.training.log import what_is_kept


@dataclass
class State:
    """Where a training stands: `iteration` counts within the epoch."""

    epoch: int = 0
    iteration: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0


def checkpoint_content(engine: Engine, state: State) -> dict[str, Any]:
    """All that a training needs to go on, bit by bit."""
    return {"engine": engine.state_dict(), "random": read_torch(_device(engine)), "state": vars(state)}


def check_finite(engine: Engine, state: State, last: Path) -> None:
    """Raises L2TError where a parameter, momentum or buffer is not finite, so that it does not get into a checkpoint.

    The losses of an iteration are those before its step: what the last step made, only this sees.
    """
    content = engine.state_dict()
    tensors = [item for group in ("theta", "momentum", "buffers", "phi") for item in content[group].items()]
    if bool(torch.stack([tensor.isfinite().all() for _, tensor in tensors]).all()):  # a GPU is waited for once
        return
    for name, tensor in tensors:
        if not bool(tensor.isfinite().all()):
            raise L2TError(
                f"'{name}' is not finite before epoch {state.epoch}, iteration {state.iteration}: "
                f"{what_is_kept(last)}; lower the learning rate or beta."
            )


def restore(path: Path, engine: Engine) -> State:
    """Puts `engine` and the random generators where the checkpoint at `path` has them.

    Raises:
        L2TError: the file is damaged, or of another training.
    """
    content = load_checkpoint(path)
    try:
        engine.load_state_dict(content["engine"])
        set_torch(content["random"], _device(engine))
        return State(**content["state"])
    except L2TError as error:
        raise L2TError(f"checkpoint {path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise L2TError(f"checkpoint {path} is of something else: give one that `l2t-fast train` wrote.") from error


def _device(engine: Engine) -> torch.device:
    return next(engine.learner.parameters()).device
