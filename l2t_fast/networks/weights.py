"""Weights of networks from any checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from l2t_fast.errors import L2TError


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, on the CPU: bare, or under `state_dict`, `model` or `weights` (best.pt).

    Raises L2TError when the file is missing, truncated, or no checkpoint of tensors.
    """
    if not Path(path).is_file():
        raise L2TError(f"there is no checkpoint file {path}; give the path of one.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes of any origin the unpickler may raise anything
        raise L2TError(
            f"{path} is not a checkpoint that PyTorch can read (truncated, or of another kind); get it again."
        ) from error
    if isinstance(content, Mapping):
        for state in (content.get("state_dict"), content.get("model"), content.get("weights"), content):
            if isinstance(state, Mapping) and state and all(isinstance(v, Tensor) for v in state.values()):
                return {str(key): value for key, value in state.items()}
    raise L2TError(f"{path} holds no weights; give a state dict of tensors, bare or under 'state_dict' or 'model'.")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copies the weights of a checkpoint file into `model`, whatever the parameter names in the file.

    Entries are matched by name, also without a prefix that all share (`module.`), otherwise by position: both
    must then be the same sequence of shapes and of roles (`weight`, `bias`, `running_mean`, `running_var`).
    `num_batches_tracked` is ignored. Values are converted to the dtype and device of the model.

    Raises L2TError, with the model unchanged, for an unreadable file and for one that does not fit, with the
    first difference.
    """
    wanted = _weights(model.state_dict())
    found = _weights(read_checkpoint(path))
    pairs = list(zip(wanted, found, strict=False))
    named = found
    while named.keys() != wanted.keys() and _share_first_part(named):
        named = {key.partition(".")[2]: value for key, value in named.items()}
    if named.keys() == wanted.keys():
        found, pairs = named, [(key, key) for key in wanted]

    def differ(reason: str) -> L2TError:
        return L2TError(
            f"{path} does not fit the network: {reason}; "
            "build the network it was made with (its name, width and number of classes)."
        )

    for ours, theirs in pairs:
        role, shape = ours.rpartition(".")[2], list(wanted[ours].shape)
        if theirs.rpartition(".")[2] != role or list(found[theirs].shape) != shape:
            raise differ(f"it has {theirs} {list(found[theirs].shape)} where the network has {ours} {shape}")
    if len(found) > len(wanted):
        raise differ(f"the network has nothing for {list(found)[len(wanted)]}")
    if len(wanted) > len(found):
        raise differ(f"it has nothing for {list(wanted)[len(found)]}")
    for ours, theirs in pairs:
        wanted[ours].copy_(found[theirs])


def checkpoint_classes(path: str | Path) -> int:
    """The number of classes of the network in a checkpoint file: the rows of its last 2-D weight.

    Raises L2TError when the file is unreadable or has no such weight.
    """
    state = read_checkpoint(path)
    rows = [value.shape[0] for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    if not rows:
        raise L2TError(f"{path} has no linear classifier to count classes from; give the number of classes.")
    return rows[-1]


def _weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _share_first_part(names: Iterable[str]) -> bool:
    parts = [name.partition(".") for name in names]
    return len({first for first, _, _ in parts}) == 1 and all(dot for _, dot, _ in parts)
