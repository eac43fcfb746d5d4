"""Miniature data sets in their real layouts, and what is compared of images."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from l2t_fast.data.images import MEAN, STD, ImageSet, TensorSet

SHARED = Path(__file__).parents[3] / "shared"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normalised(x: Tensor) -> Tensor:
    """What ToTensor and Normalize make of uint8 images."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (x.expand(-1, 3, -1, -1).float() / 255 - mean) / std


def fingerprints(images: ImageSet) -> set[bytes]:
    return {x.numpy().tobytes() for batch, _ in images.eval_batches(64) for x in batch}


def equal(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def tensor_set(n: int, augment: bool, flip: bool = True, channels: int = 3) -> TensorSet:
    images = torch.from_numpy(rng().integers(1, 256, (n, channels, 12, 10), dtype=np.uint8))
    return TensorSet(labels=torch.arange(n), augment=augment, images=images, flip=flip)


def write_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), classes: str = "ab", count: int = 4) -> None:
    """An ImageFolder of images of 12 x 12, `count` a class."""
    for i, path in enumerate(f"{part}/{c}/{j}.png" for part in parts for c in classes for j in range(count)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(root / path)


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray[Any, Any], list[int]]:
    """A miniature in the real layout, 40 training and 20 test images; returns the test images [N, 3, 32, 32]."""
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    classes = {"cifar10": 10, "cifar100": 100}[name]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    for i, (file, _) in enumerate([*cls.train_list, *cls.test_list]):
        n = 20 if file in ("test", "test_batch") else 40 // len(cls.train_list)
        images = rng(i).integers(0, 256, (n, 3 * 32 * 32), dtype=np.uint8)
        labels = [j * 7 % classes for j in range(n)]
        (folder / file).write_bytes(pickle.dumps({"data": images, key: labels}))
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: [str(c) for c in range(classes)]}))
    monkeypatch.setattr(cls, "train_list", [(file, None) for file, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [(file, None) for file, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": None})
    return images.reshape(-1, 3, 32, 32), labels


def write_npz(path: Path, channels: int = 1, column: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """A miniature as MedMNIST has them, 18, 9 and 10 images of 12 x 12 and three classes; returns its arrays."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for i, (part, n) in enumerate({"train": 18, "val": 9, "test": 10}.items()):
        shape = (n, 12, 12) if channels == 1 else (n, 12, 12, channels)
        labels = np.arange(n, dtype=np.uint8) * 7 % 3
        arrays[f"{part}_images"] = rng(i).integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{part}_labels"] = labels[:, None] if column else labels
    np.savez(path, **arrays)
    return arrays


def write_tinyimagenet(root: Path) -> tuple[list[Path], list[Path]]:
    """A miniature in the real layout; the training and test images, by class and then by name."""
    home = root / "tiny-imagenet-200"
    wnids = [f"n{j * 7919 % 200:08}" for j in range(200)]  # in no order, as the real ones
    train = [home / f"train/{w}/images/{w}_{k}.JPEG" for w in wnids for k in (10, 9)]
    test = {home / f"val/images/val_{j}.JPEG": w for j, w in enumerate(wnids)}
    for i, path in enumerate([*train, *test]):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if i % 50 == 0 else pixels).save(path)  # some are gray
    (home / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (home / "val/val_annotations.txt").write_text("".join(f"{p.name}\t{w}\t0\t32\t44\t62\n" for p, w in test.items()))
    return sorted(train), sorted(test, key=lambda path: test[path])


def write_photographs(root: Path, name: str) -> dict[str, list[str]]:
    """A miniature in the real layout, 2 training images and 1 test image a class; {part: [CLASS/IMAGE.jpg]}."""
    classes = {
        # None in the order of their names, which in turn is not that of the paths: "-" comes before "/".
        "cub200": [f"{j * 77 % 200 + 1:03}.Black_footed_Albatross" for j in range(200)],
        "stanford-dogs": [f"n{2000000 + j * 77 % 120}-Shih-Tzu" for j in range(118)] + ["n02-a", "n02"],
        "mit67": [f"{'zyx'[j % 3]}_inside_{j}" for j in range(65)] + ["bar-2", "bar"],
        "stanford40": [f"{'zyx'[j % 3]}_a_bike_{j}" for j in range(38)] + ["running_far", "running"],
    }[name]
    parts = {
        "train": [f"{c}/{c}_{k}.jpg" for c in classes for k in (9, 10)],
        "test": [f"{c}/{c}_2.jpg" for c in classes],
    }
    folder = {"cub200": "images", "stanford40": "JPEGImages"}.get(name, "Images")
    for i, file in enumerate(parts["train"] + parts["test"]):
        path = root / folder / (Path(file).name if name == "stanford40" else file)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng(i).integers(0, 256, (12, 16, 3), dtype=np.uint8))
        if i % 3:
            image.convert(("RGB", "L")[i % 2]).save(path)
        else:
            image.convert("P").save(path, format="PNG")  # named .jpg, as some are
    if name == "cub200":
        images = parts["test"] + parts["train"]
        rows = [(file, classes.index(file.partition("/")[0]) + 1, int(file in parts["train"])) for file in images]
        for i, file in enumerate(("images.txt", "image_class_labels.txt", "train_test_split.txt")):
            (root / file).write_text("".join(f"{j} {row[i]}\n" for j, row in enumerate(rows, 1)))
        (root / "classes.txt").write_text("".join(f"{j} {c}\n" for j, c in enumerate(classes, 1)))
    elif name == "stanford-dogs":
        for part, files in parts.items():
            cells = np.array(files, dtype=object)[:, None]
            scipy.io.savemat(root / f"{part}_list.mat", {"file_list": cells, "labels": np.ones((len(files), 1))})
    elif name == "mit67":
        for part, files in parts.items():
            (root / f"{part.title()}Images.txt").write_text("\n".join(files))
    else:
        (root / "ImageSplits").mkdir()
        for part, files in parts.items():
            names = [Path(file).name for file in files]
            (root / f"ImageSplits/{part}.txt").write_text("\n".join(names))
            for c in classes:
                mine = [file for file in names if file.rpartition("_")[0] == c]
                (root / f"ImageSplits/{c}_{part}.txt").write_text("\n".join(mine) + "\n")
    return parts


PHOTOGRAPHS = {"cub200": 200, "mit67": 67, "stanford40": 40, "stanford-dogs": 120}


def sort_by_part(root: Path, parts: dict[str, list[str]], images: Path, remove: bool) -> None:
    """What the authors' scripts do: copies to train/CLASS and test/CLASS."""
    for part, files in parts.items():
        for file in files:
            path = root / part / file
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / (file if (images / file).exists() else Path(file).name), path)
    if remove:
        shutil.rmtree(images)


def save_split(prefix: Path, train: Any, val: Any, test: Any) -> str:
    for part, content in (("train", train), ("val", val), ("test", test)):
        torch.save(content, f"{prefix}-{part}")
    return str(prefix)
