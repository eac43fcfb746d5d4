"""Weights of networks from any checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.networks.architectures import build_shapes
from l2t_fast.networks.checkpoint import read_checkpoint
from l2t_fast.networks.correspondence import correspond, find_prefix


def load_weights(model: nn.Module, place: str | Path) -> None:
    """Copies the weights of a checkpoint file, of torch.save or of safetensors, into `model`.

    place: FILE, or FILE:PREFIX where the file holds several networks (Lightning's), or for its moving average
    (FILE:model_ema); `read_checkpoint` says which state dict is taken.

    Names decide, behind a prefix that the network has there (`module.`, `model.`); modules of other names are put
    together by roles and shapes where that is possible in one way only, and else refused (`correspond`).
    `num_batches_tracked` is ignored. Values are converted to the dtype and device of the model.

    Raises L2TError, with the model unchanged, for an unreadable file, for one that does not fit, with the first
    difference, and for one whose names leave more than one way, with those names.
    """
    wanted, found = _weights(model.state_dict()), _weights(read_checkpoint(place))
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise L2TError(f"{place} is no good source: '{name}' in it is not finite; give other weights.")
    for ours, theirs in correspond(wanted, found, str(place)).items():
        wanted[ours].copy_(found[theirs])


def checkpoint_classes(place: str | Path, name: str, width: float = 1.0) -> int:
    """The number of classes of the network in a checkpoint file: the rows of its last 2-D weight.

    place: as for `load_weights`, which entries are the network's too; name, width: its architecture, as for
    `build_model`.

    Raises L2TError when the file is unreadable, holds several such networks, or has no such weight.
    """
    found = _weights(read_checkpoint(place))
    wanted = _weights(build_shapes(name, 1, width).state_dict())
    prefix = find_prefix(wanted, found, str(place))
    head = next((prefix + entry for entry in _linear(wanted)[-1:]), None)
    if head not in found:  # it has another name there
        others = [entry for entry in _linear(found) if entry.removeprefix(prefix) not in wanted]
        head = next(reversed([entry for entry in others if entry.startswith(prefix)] or others), None)
    if head is None or found[head].ndim != 2:
        raise L2TError(f"{place} has no linear classifier to count classes from; give the number of classes.")
    return found[head].shape[0]


def _linear(state: Mapping[str, Tensor]) -> list[str]:
    """The 2-D weights."""
    return [name for name, value in state.items() if name.endswith("weight") and value.ndim == 2]


def _weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
