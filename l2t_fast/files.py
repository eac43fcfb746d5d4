"""Files written whole or not at all, checkpoints read with care; torch is loaded for checkpoints alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from l2t_fast.errors import L2TError

if TYPE_CHECKING:
    from torch import nn

_FORMAT = "l2t_fast.checkpoint.1"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings and containers of them; an older file stays until this one is whole."""
    import torch

    with _whole(path) as file:
        torch.save({"format": _FORMAT, **content}, file)


def save_weights(path: Path, network: nn.Module, classes: int, **more: Any) -> None:
    """Writes the weights of a network as the authors' checkpoints hold them, and `more` numbers and strings."""
    import torch

    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    with _whole(path) as file:
        torch.save({"state_dict": state, "num_classes": classes, **more}, file)


def save_text(path: Path, text: str) -> None:
    """Writes `text`, whole or not at all."""
    with _whole(path) as file:
        file.write(text.encode())


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        L2TError: the file is missing, truncated, or of something else.
    """
    import torch

    if not path.is_file():
        raise L2TError(f"there is no checkpoint {path}: start the run anew.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a damaged file may raise
        raise L2TError(
            f"checkpoint {path} is damaged or not a checkpoint: remove it and start that part anew."
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise L2TError(f"{path} is not a checkpoint of l2t_fast: give one that `l2t-fast train` wrote.")
    return content
