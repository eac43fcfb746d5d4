"""TinyImageNet. Its `val` is the test set: the labels of its `test` are not public."""

from __future__ import annotations

import hashlib
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.utils import download_and_extract_archive

from l2t_fast.choices import SMALL
from l2t_fast.data.loading import load
from l2t_fast.data.readers.layout import (
    DamagedError,
    Labelled,
    Listed,
    TrainTest,
    lines,
    open_image,
    ordered,
    unpacked,
    word_pairs,
)
from l2t_fast.errors import L2TError
from l2t_fast.files import load_checkpoint, save_checkpoint

URL, _MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


def tinyimagenet(root: Path, download: bool) -> TrainTest:
    """The images, shrunk from 64 to 32; decoded once, and kept in a file beside them where one can be written."""
    if download and not (unpacked(root, "tiny-imagenet-200") / "wnids.txt").is_file():
        try:
            download_and_extract_archive(URL, str(root), md5=_MD5)
        except (RuntimeError, OSError, ValueError) as error:
            raise DamagedError(str(error)) from error
    home = unpacked(root, "tiny-imagenet-200")
    train: Listed = []
    for wnid in lines(home / "wnids.txt"):
        folder = f"{home}/train/{wnid}/images"
        if not os.path.isdir(folder):
            raise DamagedError(f"there is no {folder}")
        train += [(wnid, f"{folder}/{file}") for file in os.listdir(folder) if file.endswith(".JPEG")]
    test = [(wnid, f"{home}/val/images/{file}") for file, wnid in word_pairs(home / "val/val_annotations.txt").items()]
    (y_train, paths), (y_test, test_paths) = ordered(train, test, 200)
    images = _cached(home / "l2t-fast-32x32.pt", paths + test_paths)
    return Labelled(y_train, images[: len(y_train)]), Labelled(y_test, images[len(y_train) :])


def _cached(cache: Path, paths: list[str]) -> Tensor:
    """The images of `paths` at 32 x 32, uint8 [N, 3, 32, 32]: those in `cache`, if it was made from the same files."""
    key = hashlib.sha256()
    for path in paths:
        status = os.stat(path)
        key.update(f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    try:
        content = load_checkpoint(cache)
        images: Tensor = content["images"]
        if content["key"] == key.hexdigest() and content["crc"] == zlib.crc32(images.numpy().data):
            return images
    except (L2TError, KeyError, AttributeError, TypeError, ValueError):
        pass
    # Processes, as threads would wait for each other: most of a small image's time is Python's.
    decoded = list(load(_Shrunk(paths), 256, min(os.cpu_count() or 1, 16)))  # each [B, 32, 32, 3]
    images = torch.cat(decoded).permute(0, 3, 1, 2).contiguous()
    with suppress(L2TError, RuntimeError):  # a folder that cannot be written, or a full disk: decoded again next time
        save_checkpoint(cache, {"key": key.hexdigest(), "crc": zlib.crc32(images.numpy().data), "images": images})
    return images


class _Shrunk(Dataset[Any]):
    """Images as torchvision's Resize makes them, arrays uint8 [32, 32, 3]."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return np.array(open_image(self.paths[index]).resize((SMALL, SMALL), Image.Resampling.BILINEAR))
