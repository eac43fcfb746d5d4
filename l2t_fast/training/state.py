"""Where a training stands: what its checkpoint holds, and what may go into one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.engine.engine import Engine
from l2t_fast.errors import DamagedFileError, L2TError
from l2t_fast.files import load_checkpoint
from l2t_fast.learner.generators import read_torch, set_torch
from l2t_fast.ranks import ALONE, Ranks
from l2t_fast.training.log import ADVICE, what_is_kept
from l2t_fast.training.watch import Watch

HASHES = (
    "images",
    "images in the files",
    "source weights",
)  # of what a training is made of: what is compared by its checksum alone
# What is said only since there is a choice: how all were made before.
UNSAID = {"--optimizer": "sgd", "--max-grad-norm": "None", "--label-smoothing": "0.0"}


@dataclass
class State:
    """Where a training stands: `iteration` counts within the epoch."""

    epoch: int = 0
    iteration: int = 0
    best_accuracy: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0


def begin_random(ranks: Ranks) -> None:
    """Ranks draw other random numbers than each other, for other images; rank 0 those of a process alone."""
    if ranks.rank:
        torch.manual_seed((torch.initial_seed() + ranks.rank * 1_000_003) % 2**63)


def checkpoint_content(engine: Engine, state: State, made: Mapping[str, str], ranks: Ranks = ALONE) -> dict[str, Any]:
    """All that a training needs to go on, bit by bit; and what it is `made` of, which must be the same then."""
    random = ranks.gathered(read_torch(_device(engine)))
    return {
        "engine": engine.state_dict(),
        "random": random[0],
        **({"random_of_ranks": random} if ranks.count > 1 else {}),
        "state": vars(state),
        "made": dict(made),
        "threads": torch.get_num_threads(),
    }


def size_of(engine: Engine) -> int:
    """Bytes of a checkpoint, about; Adam's moments are those of φ."""
    state = engine.state_dict()
    tensors = [t for group in [*_groups(state), "phi", "phi"] for t in state[group].values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_finite(engine: Engine, state: State, last: Path) -> None:
    """Raises L2TError where a parameter, momentum or buffer is not finite, so that it does not get into a checkpoint.

    The losses of an iteration are those before its step: what the last step made, only this sees.
    """
    content = engine.state_dict()
    tensors = [item for group in _groups(content) for item in content[group].items()]
    if bool(torch.stack([tensor.isfinite().all() for _, tensor in tensors]).all()):  # a GPU is waited for once
        return
    for name, tensor in tensors:
        if not bool(tensor.isfinite().all()):
            why = ", since the meta-gradient was not" if name.startswith(("what.", "where.")) else ""
            raise L2TError(
                f"'{name}' is not finite before epoch {state.epoch}, iteration {state.iteration}{why}: "
                f"{what_is_kept(last)}; {ADVICE}."
            )


def _groups(state: dict[str, Any]) -> list[str]:
    """Parameters, what their optimizer keeps, and buffers."""
    return [name for name in state if name not in ("adam", "lr")]


def restore(path: Path, engine: Engine, made: Mapping[str, str], watch: Watch, ranks: Ranks = ALONE) -> State:
    """Puts `engine` and the random generators where the checkpoint at `path` has them.

    Args:
        made: what this training is made of; checkpoints of older versions do not say what theirs was.
        watch: gets a line where it goes on, but not to the bit.

    Raises:
        DamagedFileError: the file is damaged, or holds what is not finite.
        L2TError: it is of another training.
    """
    content = ranks.first(lambda: load_checkpoint(path))
    if not _is_whole(content):
        raise L2TError(f"checkpoint {path} is of something else: give one that `l2t-fast train` wrote.")
    check_made(f"checkpoint {path}", content.get("made", {}), made)
    _check_loaded(path, content["engine"])
    threads = torch.get_num_threads()
    if _device(engine).type == "cpu" and content.get("threads", threads) != threads:
        watch.say(
            f"{path} was made with {content['threads']} CPU threads: with {threads} sums are taken in another order, "
            "and the training does not go on to the bit\n"
        )
    random = content.get("random_of_ranks", [content.get("random")])
    if len(random) != ranks.count:
        watch.say(
            f"{path} was made on {len(random)} processes: on {ranks.count} other random numbers are drawn, and the "
            "training does not go on to the bit\n"
        )
    try:
        engine.load_state_dict(content["engine"])
        if ranks.rank < len(random):
            set_torch(random[ranks.rank], _device(engine))
        return State(**content["state"])
    except L2TError as error:
        raise L2TError(f"checkpoint {path}: {error}") from error
    except (KeyError, TypeError, RuntimeError) as error:  # RuntimeError: no state of a generator
        raise L2TError(f"checkpoint {path} is of something else: give one that `l2t-fast train` wrote.") from error


def load_best(path: Path, network: nn.Module, made: Mapping[str, str], epoch: int | None) -> dict[str, Tensor]:
    """The weights of `network` in a best.pt.

    Args:
        made: as for `restore`.
        epoch: the one they are to be of, where that is known.

    Raises:
        DamagedFileError: the file is damaged, or holds what is not finite.
        L2TError: it is of another training, or of another epoch.
    """
    content = load_checkpoint(path)
    weights, theirs = content.get("weights"), content.get("made", {})
    if not isinstance(theirs, dict) or not isinstance(weights, dict) or not _is_of(weights, network):
        raise L2TError(f"checkpoint {path} is of something else: remove {path.parent}, to train that part anew.")
    if theirs:  # older files say nothing, not even which optimizer
        check_made(f"checkpoint {path}", theirs, made)
    _check_loaded(path, weights)
    if epoch is not None and content.get("epoch") != epoch:
        raise L2TError(
            f"checkpoint {path} is of epoch {content.get('epoch')}, and epoch {epoch} was best: remove {path.parent}, "
            "to train that part anew."
        )
    return dict(weights)


def _is_of(weights: Mapping[Any, Any], network: nn.Module) -> bool:
    """Whether these are weights of `network`, by their names, sizes and types."""
    ours = network.state_dict()
    return (
        weights.keys() == ours.keys()
        and all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in weights.values())
        and all((t.shape, t.dtype) == (ours[name].shape, ours[name].dtype) for name, t in weights.items())
    )


def check_made(what: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raises L2TError where `what` was made of something else than this training is; as far as both say it."""
    for name, value in {**UNSAID, **theirs}.items():
        if (own := ours.get(name, value)) != value:
            told = f"other {name}" if name in HASHES else f"{name} {value}, not {own}"
            raise L2TError(f"{what} was made with {told}: put that back, or give another --name.")


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether a checkpoint has what `checkpoint_content` puts there; older ones say less."""
    state, usual = content.get("state"), vars(State())
    return (
        isinstance(state, dict)
        and state.keys() <= usual.keys()
        and all(isinstance(value, int) or isinstance(usual[name], float) for name, value in state.items())
        and all(isinstance(value, int | float) and math.isfinite(value) for value in state.values())
        and min(state.get("epoch", 0), state.get("iteration", 0), state.get("seconds", 0)) >= 0
        and -1 <= state.get("best_epoch", -1) <= state.get("epoch", 0)
        and state.get("best_accuracy", -1) <= 1
        and isinstance(content.get("random"), dict)
        and isinstance(content.get("random_of_ranks", []), list)
        and isinstance(content.get("engine"), dict)
        and isinstance(content.get("made", {}), dict)
        and isinstance(content.get("threads", 1), int)
    )


def _check_loaded(path: Path, tensors: Mapping[Any, Any]) -> None:
    """Raises DamagedFileError where a tensor of the engine is not finite: none was, when it was saved."""
    for name, value in tensors.items():
        if isinstance(value, dict):
            _check_loaded(path, value)
        elif isinstance(value, Tensor) and (value.layout != torch.strided or not bool(value.isfinite().all())):
            what = "is not finite" if value.layout == torch.strided else f"is {value.layout}"
            raise DamagedFileError(
                f"checkpoint {path} is damaged ('{name}' {what}): remove {path.parent}, to train that part anew."
            )


def _device(engine: Engine) -> torch.device:
    return next(engine.learner.parameters()).device
