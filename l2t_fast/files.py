"""Files written whole or not at all, and read with care; torch is loaded for checkpoints alone."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2t_fast.errors import DamagedFileError, L2TError, MachineError

if TYPE_CHECKING:
    from torch import nn

_FORMAT = "l2t_fast.checkpoint.1"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors, numbers, strings and containers of them; an older file stays until this one is whole.

    Raises:
        MachineError: the disk is full, or the file may not be written.
    """
    _save_torch(path, {"format": _FORMAT, **content})


def save_weights(path: Path, network: nn.Module, classes: int, **more: Any) -> None:
    """Writes the weights of a network as the authors' checkpoints hold them, and `more` numbers and strings.

    Raises:
        MachineError: as `save_checkpoint`.
    """
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    _save_torch(path, {"state_dict": state, "num_classes": classes, **more})


def _save_torch(path: Path, content: dict[str, Any]) -> None:
    import torch

    buffer = io.BytesIO()  # whole in memory first: PyTorch's writer says of a full disk neither what nor why
    torch.save(content, buffer)
    save_bytes(path, buffer.getbuffer())


def save_text(path: Path, text: str) -> None:
    """Writes `text`, whole or not at all.

    Raises:
        MachineError: as `save_checkpoint`.
    """
    save_bytes(path, text.encode("utf-8", "surrogateescape"))  # names of files may be any bytes


def save_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes `content`, whole or not at all.

    Raises:
        MachineError: as `save_checkpoint`.
    """
    part = path.with_name(path.name + ".part")
    try:
        with writing(path, len(content)):
            part.unlink(missing_ok=True)  # of a killed process; and what a link leads to is not ours
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def keep_as(path: Path, other: Path) -> None:
    """The file stays under another name as well, whatever takes its place; on file systems with links."""
    with suppress(OSError):
        other.unlink(missing_ok=True)
        os.link(path, other)


def check_room(folder: Path, needed: int) -> None:
    """Raises MachineError where the disk has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"the checkpoints in {folder} take {needed:,} bytes, and there is room for {free:,}: make room, or give "
            "another --runs."
        )


def check_there(path: Path) -> None:
    """Raises MachineError where a file that was there at the start is so no longer."""
    if not path.exists():
        raise MachineError(f"{path.parent} was removed meanwhile: what was in it is lost; start anew.")


def at_home(path: Path) -> Path:
    """With "~" for the user's home; as it is where there is no such user."""
    return Path(os.path.expanduser(path))


def make_folder(path: Path) -> None:
    """Makes the folder and those above it, where they are missing.

    Raises:
        MachineError: the disk is full, or the folder may not be made.
        L2TError: a file is in its way.
    """
    with writing(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # its parents were made: nobody can make a folder there
            raise MachineError(f"{path} cannot be made ({error.strerror}): give another --runs.") from error


@contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Says in one sentence why `path`, of `size` bytes, could not be written."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise L2TError(f"{path} cannot be written ({error.strerror}): give another --name or --runs.") from error
    except FileNotFoundError as error:
        raise MachineError(
            f"{path} cannot be written, as its folder was removed meanwhile: what was in it is lost; start anew."
        ) from error
    except OSError as error:
        why, advice = error.strerror or str(error), "allow writing there, or give another folder"
        if error.errno in _NO_ROOM:
            why, advice = f"{why}; {_room(path, size)}", "make room, then go on"
        raise MachineError(f"{path} cannot be written ({why}): {advice}; what was there before is intact.") from error


def _room(path: Path, size: int | None) -> str:
    """What is needed, and what there is."""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    needed = f"{size:,} bytes needed, " if size is not None else ""
    inodes = f" and {os.statvfs(folder).f_favail:,} more files" if hasattr(os, "statvfs") else ""
    return f"{needed}room for {shutil.disk_usage(folder).free:,} bytes{inodes}"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        DamagedFileError: the file is missing, truncated or changed.
        L2TError: it is of something else.
    """
    import torch

    if not path.is_file():
        raise DamagedFileError(f"there is no checkpoint {path}: start the run anew.")
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch does not look at the checksums
            changed = archive.testzip()
        if changed is not None:
            raise zipfile.BadZipFile(changed)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a damaged file may raise
        raise DamagedFileError(
            f"checkpoint {path} is damaged or not a checkpoint: remove {path.parent}, to train that part anew."
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise L2TError(f"{path} is not a checkpoint of l2t_fast: give one that `l2t-fast train` wrote.")
    return content


class TwiceError(ValueError):
    """JSON that says one thing twice: whose reader knows which of them is meant?"""


def parse_json(content: bytes) -> Any:
    """What JSON says.

    Raises:
        TwiceError: it says one thing twice.
        ValueError: it is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise TwiceError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice")
        return found

    try:
        return json.loads(content, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def load_json(path: Path, numbers: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object, which has `numbers` under these keys.

    Raises:
        L2TError: the file is missing, empty or damaged, or holds something else.
    """
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise L2TError(f"{path} is damaged ({error or 'empty'}): remove it, and give the command again.") from error
    if not isinstance(content, dict):
        raise L2TError(f"{path} is damaged (not an object of JSON): remove it, and give the command again.")
    for key in numbers:
        if not isinstance(content.get(key), int | float) or isinstance(content[key], bool):
            raise L2TError(f"{path} is damaged ('{key}' is no number): remove it, and give the command again.")
    return content
