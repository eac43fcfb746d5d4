"""Starting from the source's weights."""

from collections.abc import Sequence

import torch
from torch import nn

from l2t_fast.errors import UnfitError
from l2t_fast.methods.base import Method


@torch.no_grad()
def copy_weights(target: nn.Module, sources: Sequence[nn.Module]) -> str:
    """Copies the source's parameters and buffers into those of the target that have the same name and shape.

    The target's last linear layer, its classifier, always starts fresh; so does what another architecture has more or
    wider. Returns how much was copied, for the user.

    Raises:
        UnfitError: there is not exactly one source, or no convolution or linear layer of it fits.
    """
    if len(sources) != 1:
        raise UnfitError(f"finetune starts from one source, not {len(sources)}: give one, or leave finetune out.")
    theirs, ours = sources[0].state_dict(), target.state_dict()
    classifier = [name for name, module in target.named_modules() if isinstance(module, nn.Linear)][-1:]
    fits = {
        name: tensor
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape == tensor.shape and name.rpartition(".")[0] not in classifier
    }
    if not any(tensor.dim() > 1 for tensor in fits.values()):
        raise UnfitError(
            f"nothing of the source ({type(sources[0]).__name__}) fits the target ({type(target).__name__}), so that "
            "finetune has no start: give both the same architecture and width, or leave finetune out."
        )
    for name, tensor in fits.items():
        tensor.copy_(theirs[name])
    return f"{len(fits)} of {len(ours)} tensors from the source"


FINETUNE = Method("Razavian et al., CNN features off-the-shelf, CVPR workshops 2014", start=copy_weights)
