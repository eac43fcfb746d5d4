"""Photographs in files: what their own lists name, in the order of torchvision's ImageFolder, which the authors' split
files count in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torchvision import datasets

from l2t_fast.data.readers.layout import (
    DamagedError,
    Labelled,
    Listed,
    Reader,
    TrainTest,
    check_tree,
    lines,
    ordered,
    unpacked,
    word_pairs,
)
from l2t_fast.errors import L2TError, first_line

_Lists = Callable[[Path], tuple[Listed, Listed]]  # the folder of a data set -> what is for training and for testing


def photographs(lists: _Lists, folder: str, images: str, num_classes: int, url: str, layout: str) -> Reader:
    """folder: where it lies under the root, if not there itself; images: the folder in it that holds the images."""
    return Reader(
        read=partial(_files, lists, folder, images, num_classes),
        num_classes=num_classes,
        get=f"get it from {url} (--download cannot) and unpack it in --data-root, or in a folder {folder} there, "
        f"so that it holds {layout}",
    )


def _files(lists: _Lists, folder: str, images: str, num_classes: int, root: Path, _download: bool) -> TrainTest:
    home = unpacked(root, folder)
    if (home / images).is_dir():
        listed = lists(home)
    elif (home / "train").is_dir() and (home / "test").is_dir():  # as the authors' scripts prepare it
        listed = _in_folder(home / "train"), _in_folder(home / "test")
    else:
        raise DamagedError(f"there is no {home / images}")
    train, test = ordered(*listed, num_classes)
    return Labelled(*train), Labelled(*test)


def _in_folder(folder: Path) -> Listed:
    check_tree(folder)
    found = datasets.ImageFolder(folder, allow_empty=True)
    return [(found.classes[label], path) for path, label in found.samples]


def cub200(home: Path) -> tuple[Listed, Listed]:
    names = ("images", "classes", "image_class_labels", "train_test_split")
    files, classes, labels, trains = (word_pairs(home / f"{what}.txt") for what in names)
    parts: dict[str, Listed] = {"1": [], "0": []}
    for number, file in files.items():
        name = file.partition("/")[0]
        if classes.get(labels.get(number, "")) != name or trains.get(number) not in parts:
            raise DamagedError(f"image {number}, {file}, has no class or no part in the lists of {home}")
        parts[trains[number]].append((name, f"{home}/images/{file}"))
    return parts["1"], parts["0"]


def mit67(home: Path) -> tuple[Listed, Listed]:
    return _in_classes(home / "Images", *(lines(home / f"{part}Images.txt") for part in ("Train", "Test")))


def stanford40(home: Path) -> tuple[Listed, Listed]:
    parts: tuple[Listed, Listed] = [], []
    for listed, end in zip(parts, ("_train.txt", "_test.txt"), strict=True):
        for path in (home / "ImageSplits").glob(f"*{end}"):
            action = path.name.removesuffix(end)
            listed += [(action, f"{home}/JPEGImages/{file}") for file in lines(path)]
        if not listed:
            raise DamagedError(f"there is no {home}/ImageSplits/ACTION{end}")
    return parts


def stanford_dogs(home: Path) -> tuple[Listed, Listed]:
    from scipy.io import loadmat  # here, as no other data set waits for it

    lists = home / "lists" if (home / "lists").is_dir() else home
    parts = []
    for path in (lists / "train_list.mat", lists / "test_list.mat"):
        if not path.is_file():
            raise DamagedError(f"there is no {path}")
        try:
            parts.append([str(cell.item()) for cell in loadmat(path)["file_list"].ravel()])
        except Exception as error:  # on bytes of any origin the reader may raise anything
            raise DamagedError(f"{path} is no MATLAB file with a file_list") from error
    return _in_classes(home / "Images", *parts)


def _in_classes(images: Path, train: list[str], test: list[str]) -> tuple[Listed, Listed]:
    """Lists of CLASS/IMAGE in the folder `images`."""
    train_part, test_part = ([(f.partition("/")[0], f"{images}/{f}") for f in part] for part in (train, test))
    return train_part, test_part


def image_folder(root: Path, _download: bool) -> TrainTest:
    """Any ImageFolder: train/CLASS/IMAGE, and the same under test/ or val/."""
    held_out = root / "test" if (root / "test").is_dir() else root / "val"
    try:
        for part in (root / "train", held_out):
            check_tree(part)
        train, test = datasets.ImageFolder(root / "train"), datasets.ImageFolder(held_out)
    except OSError as error:
        raise L2TError(
            f"{root.resolve()} is no image folder ({first_line(error)}); a folder data set has images in "
            "train/CLASS/, and in test/CLASS/ or val/CLASS/, under --data-root."
        ) from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise L2TError(f"class {odd} is in one of {root / 'train'} and {held_out} only; make their classes equal.")
    train, test = (Labelled(torch.tensor(part.targets), [path for path, _ in part.samples]) for part in (train, test))
    return train, test
