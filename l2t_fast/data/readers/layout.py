"""Data sets as they lie on disk: the table of their names, and for each a reader of its own archives' layout."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from l2t_fast.errors import L2TError
from l2t_fast.files import load_checkpoint, save_checkpoint

SMALL, LARGE = 32, 224  # height and width of the paper's two kinds of images


class Part(NamedTuple):
    """A training or a test set. labels: int64 [N]; images: uint8 [N, C, H, W] with C = 1 or 3, or N paths."""

    labels: Tensor
    images: Tensor | list[str]


Parts = tuple[Part, Part | None]  # for training and for testing
Listed = list[tuple[str, str]]  # class and path of each image, in any order
Labelled = tuple[Tensor, list[str]]  # int64 [N], and N paths


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


# TinyImageNet. Its `val` is the test set: the labels of its `test` are not public.

_TINY_URL, _TINY_MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


def _tinyimagenet(root: Path, download: bool) -> Parts:
    """The images, shrunk from 64 to 32; decoded once, and kept in a file beside them where one can be written."""
    if download and not (_home(root, "tiny-imagenet-200") / "wnids.txt").is_file():
        try:
            download_and_extract_archive(_TINY_URL, str(root), md5=_TINY_MD5)
        except (RuntimeError, OSError, ValueError) as error:
            raise _Broken(str(error)) from error
    home = _home(root, "tiny-imagenet-200")
    train: Listed = []
    for wnid in _lines(home / "wnids.txt"):
        folder = f"{home}/train/{wnid}/images"
        if not os.path.isdir(folder):
            raise _Broken(f"there is no {folder}")
        train += [(wnid, f"{folder}/{file}") for file in os.listdir(folder) if file.endswith(".JPEG")]
    test = [(wnid, f"{home}/val/images/{file}") for file, wnid in _pairs(home / "val/val_annotations.txt").items()]
    (y_train, paths), (y_test, test_paths) = _ordered(train, test, 200)
    images = _cached(home / "l2t-fast-32x32.pt", paths + test_paths)
    return Part(y_train, images[: len(y_train)]), Part(y_test, images[len(y_train) :])


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
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        decoded = np.stack(list(pool.map(_shrunk, paths, chunksize=256)))  # [N, 32, 32, 3]
    images = torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()
    with suppress(OSError, RuntimeError):  # a folder that cannot be written, or a full disk: decoded again next time
        save_checkpoint(cache, {"key": key.hexdigest(), "crc": zlib.crc32(images.numpy().data), "images": images})
    return images


def _shrunk(path: str) -> Any:
    """An image as torchvision's Resize makes it, an array uint8 [32, 32, 3]."""
    return np.asarray(open_image(path).resize((SMALL, SMALL), Image.Resampling.BILINEAR))


# Photographs in files: what their own lists name, in the order of torchvision's ImageFolder, which the authors' split
# files count in.

_Lists = Callable[[Path], tuple[Listed, Listed]]  # the folder of a data set -> what is for training and for testing


def _photographs(lists: _Lists, folder: str, images: str, num_classes: int, url: str, layout: str) -> Entry:
    """folder: where it lies under the root, if not there itself; images: the folder in it that holds the images."""
    return Entry(
        read=partial(_files, lists, folder, images, num_classes),
        num_classes=num_classes,
        image_size=LARGE,
        get=f"get it from {url} (--download cannot) and unpack it in --data-root, or in a folder {folder} there, "
        f"so that it holds {layout}",
    )


def _files(lists: _Lists, folder: str, images: str, num_classes: int, root: Path, _download: bool) -> Parts:
    home = _home(root, folder)
    if (home / images).is_dir():
        listed = lists(home)
    elif (home / "train").is_dir() and (home / "test").is_dir():  # as the authors' scripts prepare it
        listed = _in_folder(home / "train"), _in_folder(home / "test")
    else:
        raise _Broken(f"there is no {home / images}")
    train, test = _ordered(*listed, num_classes)
    return Part(*train), Part(*test)


def _in_folder(folder: Path) -> Listed:
    found = datasets.ImageFolder(folder, allow_empty=True)
    return [(found.classes[label], path) for path, label in found.samples]


def _cub200(home: Path) -> tuple[Listed, Listed]:
    names = ("images", "classes", "image_class_labels", "train_test_split")
    files, classes, labels, trains = (_pairs(home / f"{what}.txt") for what in names)
    parts: dict[str, Listed] = {"1": [], "0": []}
    for number, file in files.items():
        name = file.partition("/")[0]
        if classes.get(labels.get(number, "")) != name or trains.get(number) not in parts:
            raise _Broken(f"image {number}, {file}, has no class or no part in the lists of {home}")
        parts[trains[number]].append((name, f"{home}/images/{file}"))
    return parts["1"], parts["0"]


def _mit67(home: Path) -> tuple[Listed, Listed]:
    return _in_classes(home / "Images", *(_lines(home / f"{part}Images.txt") for part in ("Train", "Test")))


def _stanford40(home: Path) -> tuple[Listed, Listed]:
    parts: tuple[Listed, Listed] = [], []
    for listed, end in zip(parts, ("_train.txt", "_test.txt"), strict=True):
        for path in (home / "ImageSplits").glob(f"*{end}"):
            action = path.name.removesuffix(end)
            listed += [(action, f"{home}/JPEGImages/{file}") for file in _lines(path)]
        if not listed:
            raise _Broken(f"there is no {home}/ImageSplits/ACTION{end}")
    return parts


def _stanford_dogs(home: Path) -> tuple[Listed, Listed]:
    from scipy.io import loadmat  # here, as no other data set waits for it

    lists = home / "lists" if (home / "lists").is_dir() else home
    parts = []
    for path in (lists / "train_list.mat", lists / "test_list.mat"):
        if not path.is_file():
            raise _Broken(f"there is no {path}")
        try:
            parts.append([str(cell.item()) for cell in loadmat(path)["file_list"].ravel()])
        except Exception as error:  # on bytes of any origin the reader may raise anything
            raise _Broken(f"{path} is no MATLAB file with a file_list") from error
    return _in_classes(home / "Images", *parts)


def _in_classes(images: Path, train: list[str], test: list[str]) -> tuple[Listed, Listed]:
    """Lists of CLASS/IMAGE in the folder `images`."""
    train_part, test_part = ([(f.partition("/")[0], f"{images}/{f}") for f in part] for part in (train, test))
    return train_part, test_part


def _ordered(train: Listed, test: Listed, num_classes: int) -> tuple[Labelled, Labelled]:
    """Both parts as torchvision's ImageFolder has them: classes by name, and the files of a class by name."""
    classes = sorted({c for c, _ in train})
    odd = set(classes) ^ {c for c, _ in test}
    if odd:
        raise _Broken(f"class {min(odd)} is in one of the lists for training and testing only")
    if len(classes) != num_classes:
        raise _Broken(f"its lists name {len(classes)} classes instead of {num_classes}")
    parts = []
    for listed in (train, test):
        listed = sorted(listed, key=lambda image: (image[0], os.path.basename(image[1])))
        missing = next((path for _, path in listed if not os.path.isfile(path)), None)
        if missing:
            raise _Broken(f"{missing} is listed, but not there")
        number = {c: i for i, c in enumerate(classes)}
        parts.append((torch.tensor([number[c] for c, _ in listed]), [path for _, path in listed]))
    return parts[0], parts[1]


def _home(root: Path, folder: str) -> Path:
    """Where the data set lies: in `folder` under the root, or the root is that folder."""
    return root / folder if (root / folder).is_dir() else root


def _lines(path: Path) -> list[str]:
    """The lines of a list, without those that are empty."""
    if not path.is_file():
        raise _Broken(f"there is no {path}")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise _Broken(f"{path} is no text") from error


def _pairs(path: Path) -> dict[str, str]:
    """The first two words of each line of a list."""
    words = [line.split() for line in _lines(path)]
    if any(len(line) < 2 for line in words):
        raise _Broken(f"{path} has a line of one word")
    return {line[0]: line[1] for line in words}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


DATASETS = {
    "digits": Entry(_digits, flip=False),
    "fashion-mnist": Entry(partial(_torchvision, _fashion)),
    "cifar10": Entry(partial(_torchvision, partial(_cifar, datasets.CIFAR10))),
    "cifar100": Entry(partial(_torchvision, partial(_cifar, datasets.CIFAR100)), num_classes=100),
    "stl10": Entry(partial(_torchvision, _stl10)),
    "tinyimagenet": Entry(
        _tinyimagenet, num_classes=200, get=f"{{command}} gets {_TINY_URL} (remove a damaged copy first)"
    ),
    "cub200": _photographs(
        _cub200,
        "CUB_200_2011",
        "images",
        200,
        "http://www.vision.caltech.edu/datasets/cub_200_2011/",
        "images/CLASS/IMAGE.jpg, images.txt, classes.txt, image_class_labels.txt and train_test_split.txt, or "
        "train/CLASS/IMAGE.jpg and test/CLASS/IMAGE.jpg",
    ),
    "mit67": _photographs(
        _mit67,
        "mit67",
        "Images",
        67,
        "https://web.mit.edu/torralba/www/indoor.html",
        "Images/CLASS/IMAGE.jpg, TrainImages.txt and TestImages.txt",
    ),
    "stanford40": _photographs(
        _stanford40,
        "stanford40",
        "JPEGImages",
        40,
        "http://vision.stanford.edu/Datasets/40actions.html",
        "JPEGImages/IMAGE.jpg, ImageSplits/ACTION_train.txt and ImageSplits/ACTION_test.txt",
    ),
    "stanford-dogs": _photographs(
        _stanford_dogs,
        "stanford-dogs",
        "Images",
        120,
        "http://vision.stanford.edu/aditya86/ImageNetDogs/",
        "Images/CLASS/IMAGE.jpg, train_list.mat and test_list.mat (beside Images/ or in lists/), or "
        "train/CLASS/IMAGE.jpg and test/CLASS/IMAGE.jpg",
    ),
    "folder": Entry(_folder, num_classes=0, image_size=LARGE),
}
