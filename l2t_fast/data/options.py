"""What can be asked of the images; torch is not needed to ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where data sets lie, and how they are divided."""

    data_root: Path = Path("data")
    """where the data set lies: a folder, of npz the file"""
    download: bool = False
    """fetch it there first if it is missing (those of 32 x 32)"""
    classes: tuple[int, ...] | None = None
    """keep only these classes, relabelled 0, 1, ... in this order; by default all (digits: 5 6 7 8 9)"""
    val_fraction: float = 0.1
    """fraction of each class's training images held out for validation (npz has its own)"""
    split: str | None = None
    """PREFIX of the authors' files PREFIX-train, PREFIX-val, PREFIX-test, torch-saved (classes, indices) into the
    training set (train, val) and the test set (test); they replace --classes and --val-fraction; by default
    none"""
    image_size: int | None = None
    """side in pixels of the images of folder and npz, 8 or more, by default 224 and the file's own. Those of npz,
    and of a folder those smaller than 224, are resized to it and kept in memory: at most 4 GiB, one byte a pixel and
    channel"""
    workers: int = 2
    """processes that read images in files"""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """an image in a file that cannot be read stops the run when it is met; or all are looked at first, and those that
    cannot be read are left out, said, and listed in skipped-images.txt"""


@dataclass(frozen=True)
class DataConfig(DataOptions):
    """Which data, and which part of them."""

    dataset: str = "digits"
    """of 32 x 32: digits, fashion-mnist, cifar10, cifar100, stl10, tinyimagenet; of 224 x 224: cub200, mit67,
    stanford40, stanford-dogs, and folder (any ImageFolder: DATA_ROOT/train/CLASS/IMAGE, and the same under
    DATA_ROOT/test or DATA_ROOT/val); of its own size: npz (DATA_ROOT is a file of arrays as MedMNIST has them:
    train_images, uint8 [N, H, W] or [N, H, W, 3], train_labels, [N] or [N, 1], and the same of val and test)"""
    per_class: int | None = None
    """limited data: so many labelled training images of each class, and at most as many for validation; by default all
    (digits: 10)"""
