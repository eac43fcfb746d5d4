"""Data sets as they lie on disk: the table of their names, and for each a reader of its own archives' layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets

from l2t_fast.errors import L2TError

SMALL, LARGE = 32, 224  # height and width of the paper's two kinds of images


class Part(NamedTuple):
    """A training or a test set. labels: int64 [N]; images: uint8 [N, C, H, W] with C = 1 or 3, or N paths."""

    labels: Tensor
    images: Tensor | list[str]


Parts = tuple[Part, Part | None]  # for training and for testing


class _Broken(Exception):
    """Why a data set cannot be read; `read` adds which one, where, and how to get it."""


@dataclass(frozen=True)
class Entry:
    """What is known of a data set before it is read.

    read: (root, download) -> both parts. num_classes: 0 is to be counted. image_size: H = W of a batch's images.
    flip: mirror small training images. get: how to get it, with {command} for the command line that downloads it.
    """

    read: Callable[[Path, bool], Parts]
    num_classes: int = 10
    image_size: int = SMALL
    flip: bool = True
    get: str = "{command} gets it (remove a damaged copy first)"


def read(name: str, root: Path, download: bool) -> tuple[Part, Part | None, int]:
    """The training set, the test set and the number of classes of DATASETS[name], which lies under `root`.

    None for a test set: the data set has none. Images that stay in files are looked for, not opened.

    Raises L2TError when the data set is missing or damaged: what of it, and how to get it.
    """
    entry = DATASETS[name]
    try:
        train, test = entry.read(root.expanduser(), download)
    except (_Broken, OSError) as error:
        reason = f" ({_first_line(error)})" if str(error) else ""
        how = entry.get.format(command=f"`l2t-fast train --dataset {name} --data-root {root} --download`")
        raise L2TError(f"{name} is missing or damaged in {root.expanduser().resolve()}{reason}; {how}.") from error
    return train, test, entry.num_classes or int(train.labels.max()) + 1


def open_image(path: str) -> Image.Image:
    """The image in a file as RGB, gray and palette images too.

    Raises L2TError when it cannot be read.
    """
    try:
        image: Image.Image = datasets.folder.default_loader(path)
    except (OSError, SyntaxError, ValueError):  # SyntaxError: a broken PNG
        raise L2TError(f"{path} is no readable image; replace or remove it.") from None
    return image


def _digits(_root: Path, _download: bool) -> Parts:
    """scikit-learn's 1797 digits of 8x8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise L2TError('digits come with scikit-learn; run `pip install "l2t-fast[digits]"`.') from None
    digits = load_digits()
    gray = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] * (255 / 16)  # [N, 1, 8, 8]
    gray = F.interpolate(gray, size=SMALL, mode="bilinear", align_corners=False)
    return Part(torch.as_tensor(digits.target, dtype=torch.int64), gray.round().to(torch.uint8)), None


def _torchvision(part: Callable[[Path, bool, bool], Part], root: Path, download: bool) -> Parts:
    """part: (root, train, download) -> that part."""
    try:
        return part(root, True, download), part(root, False, download)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        # Without a download torchvision says how to get it in Python, which does not help on the command line.
        raise _Broken(str(error) if download else "") from error


def _fashion(root: Path, train: bool, download: bool) -> Part:
    part = datasets.FashionMNIST(root, train=train, download=download)
    return Part(part.targets, F.pad(part.data[:, None], [(SMALL - 28) // 2] * 4))  # [N, 28, 28] -> [N, 1, 32, 32]


def _cifar(cls: Any, root: Path, train: bool, download: bool) -> Part:
    part = cls(root, train=train, download=download)
    return Part(torch.as_tensor(part.targets), torch.as_tensor(part.data).permute(0, 3, 1, 2).contiguous())


def _stl10(root: Path, train: bool, download: bool) -> Part:
    part = datasets.STL10(root, split="train" if train else "test", download=download)
    images = F.interpolate(torch.as_tensor(part.data), size=SMALL, mode="bilinear", antialias=True)
    return Part(torch.as_tensor(part.labels, dtype=torch.int64), images)


def _folder(root: Path, _download: bool) -> Parts:
    """Any ImageFolder: train/CLASS/IMAGE, and the same under test/ or val/."""
    held_out = root / "test" if (root / "test").is_dir() else root / "val"
    try:
        train, test = datasets.ImageFolder(root / "train"), datasets.ImageFolder(held_out)
    except OSError as error:
        raise L2TError(
            f"{root.resolve()} is no image folder ({_first_line(error)}); a folder data set has images in "
            "train/CLASS/, and in test/CLASS/ or val/CLASS/, under --data-root."
        ) from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise L2TError(f"class {odd} is in one of {root / 'train'} and {held_out} only; make their classes equal.")
    train, test = (Part(torch.tensor(part.targets), [path for path, _ in part.samples]) for part in (train, test))
    return train, test


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


DATASETS = {
    "digits": Entry(_digits, flip=False),
    "fashion-mnist": Entry(partial(_torchvision, _fashion)),
    "cifar10": Entry(partial(_torchvision, partial(_cifar, datasets.CIFAR10))),
    "cifar100": Entry(partial(_torchvision, partial(_cifar, datasets.CIFAR100)), num_classes=100),
    "stl10": Entry(partial(_torchvision, _stl10)),
    "folder": Entry(_folder, num_classes=0, image_size=LARGE),
}
