"""Data sets of small images, as scikit-learn and torchvision read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torchvision import datasets

from l2t_fast.choices import SMALL
from l2t_fast.data.readers.layout import DamagedError, Labelled, TrainTest
from l2t_fast.errors import L2TError


def digits(_root: Path, _download: bool) -> TrainTest:
    """scikit-learn's 1797 digits of 8x8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise L2TError('digits come with scikit-learn; run `pip install "l2t-fast[digits]"`.') from None
    found = load_digits()
    gray = torch.as_tensor(found.images, dtype=torch.float32)[:, None] * (255 / 16)  # [N, 1, 8, 8]
    gray = F.interpolate(gray, size=SMALL, mode="bilinear", align_corners=False)
    return Labelled(torch.as_tensor(found.target, dtype=torch.int64), gray.round().to(torch.uint8)), None


def both_parts(part: Callable[[Path, bool, bool], Labelled], root: Path, download: bool) -> TrainTest:
    """part: (root, train, download) -> that part."""
    try:
        return part(root, True, download), part(root, False, download)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        # Without a download torchvision says how to get it in Python, which does not help on the command line.
        raise DamagedError(str(error) if download else "") from error


def fashion(root: Path, train: bool, download: bool) -> Labelled:
    part = datasets.FashionMNIST(root, train=train, download=download)
    return Labelled(part.targets, F.pad(part.data[:, None], [(SMALL - 28) // 2] * 4))  # [N, 28, 28] -> [N, 1, 32, 32]


def cifar(cls: Any, root: Path, train: bool, download: bool) -> Labelled:
    part = cls(root, train=train, download=download)
    return Labelled(torch.as_tensor(part.targets), torch.as_tensor(part.data).permute(0, 3, 1, 2).contiguous())


def stl10(root: Path, train: bool, download: bool) -> Labelled:
    part = datasets.STL10(root, split="train" if train else "test", download=download)
    images = F.interpolate(torch.as_tensor(part.data), size=SMALL, mode="bilinear", antialias=True)
    return Labelled(torch.as_tensor(part.labels, dtype=torch.int64), images)
