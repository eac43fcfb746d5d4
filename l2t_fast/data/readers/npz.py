"""Arrays in one file, as MedMNIST has them (Yang et al. 2023, https://medmnist.com)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from l2t_fast.data.readers.layout import Labelled, TrainTest
from l2t_fast.environment import host_memory
from l2t_fast.errors import L2TError, MachineError, first_line

_KEYS = [f"{part}_{what}" for part in ("train", "val", "test") for what in ("images", "labels")]


def npz(path: Path, _download: bool) -> TrainTest:
    """Training images with those for validation behind them, and test images.

    Raises L2TError where the file or an array of it is missing, damaged or not as `DataConfig.dataset` says.
    """
    if not path.is_file():
        raise L2TError(f"there is no file {path}; an npz data set is a file: --data-root FILE.npz.")
    arrays = _arrays(path)
    images = {part: _images(arrays[f"{part}_images"], f"{part}_images of {path}") for part in ("train", "val", "test")}
    labels = {part: _labels(arrays[f"{part}_labels"], len(images[part]), f"{part}_labels of {path}") for part in images}
    present = labels["train"].unique()  # [classes]
    if not torch.equal(present, torch.arange(len(present))):
        raise L2TError(f"train_labels of {path} leave out a class; number the classes 0, 1, 2, ... without gaps.")
    for part in ("val", "test"):
        if images[part].shape[1:] != images["train"].shape[1:]:
            raise L2TError(
                f"{part}_images of {path} are {_size(images[part])}, train_images {_size(images['train'])}; "
                "make them alike."
            )
        if int(labels[part].max()) >= len(present):
            raise L2TError(
                f"{part}_labels of {path} have class {int(labels[part].max())}, train_labels only 0 to "
                f"{len(present) - 1}; give every class training images."
            )
    y, x = (torch.cat([parts["train"], parts["val"]]) for parts in (labels, images))
    return Labelled(y, x, held_out=len(images["val"])), Labelled(labels["test"], images["test"])


def _arrays(path: Path) -> dict[str, Any]:
    """The six arrays; nothing in the file is unpickled."""
    arrays: dict[str, Any] = {}
    key = ""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in _KEYS if name not in file.files]
            _check_archive(path, file.zip)
            for key in () if missing else _KEYS:
                arrays[key] = file[key]
    except L2TError:
        raise
    except Exception as error:  # on bytes of any origin the reader may raise anything
        what = f"{key} of {path} cannot be read" if key else f"{path} is no npz file"
        raise L2TError(f"{what} ({first_line(error)}); get the file again.") from error
    if missing:
        raise L2TError(f"{path} has no {missing[0]}; an npz data set holds {', '.join(_KEYS)}.")
    return arrays


def _check_archive(path: Path, archive: ZipFile) -> None:
    """Raises L2TError where it names an array twice, or unpacked does not fit in memory: packed, gigabytes of one value
    are a small file."""
    entries = [entry for entry in archive.infolist() if entry.filename.removesuffix(".npy") in _KEYS]
    names = [entry.filename.removesuffix(".npy") for entry in entries]
    if twice := [name for name in _KEYS if names.count(name) > 1]:
        raise L2TError(f"{path} has {twice[0]} twice; keep one of them.")
    needed, (free, total) = sum(entry.file_size for entry in entries), host_memory()
    if total and needed > free:
        raise MachineError(
            f"the arrays of {path} take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free; take "
            "fewer or smaller images."
        )


def _images(array: Any, name: str) -> Tensor:
    """[N, H, W] or [N, H, W, 3] -> uint8 [N, 1 or 3, H, W]"""
    channels = array.shape[3:]
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or channels not in ((), (3,)) or 0 in array.shape:
        raise L2TError(f"{name} are {_told(array)}; give uint8 [N, H, W] or [N, H, W, 3].")
    images = torch.from_numpy(array)
    return images.permute(0, 3, 1, 2).contiguous() if channels else images[:, None]


def _labels(array: Any, n: int, name: str) -> Tensor:
    """[N] or [N, 1] -> int64 [N]"""
    if array.dtype.kind not in "iu" or array.shape not in ((n,), (n, 1)) or array.min() < 0 or array.max() >= 2**31:
        raise L2TError(f"{name} are {_told(array)}; give integers from 0, one for each of the {n} images.")
    return torch.from_numpy(array.astype(np.int64).reshape(n))


def _told(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _size(images: Tensor) -> str:
    c, h, w = images.shape[1:]
    return f"{h} x {w}, {c} channel{'s' * (c > 1)}"
