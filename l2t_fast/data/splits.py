"""Data sets, divided into images for training, validation and test."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2t_fast.bounds import BOUNDS, allowed, shown, within
from l2t_fast.choices import DATASETS, LARGE, RESIZED
from l2t_fast.data.images import FolderSet, ImageSet, TensorSet
from l2t_fast.data.options import DataConfig
from l2t_fast.data.readers.catalogue import READERS, read_dataset
from l2t_fast.data.readers.layout import Labelled
from l2t_fast.data.streams import PER_CLASS, TEST, VALIDATION, keyed_generator
from l2t_fast.errors import L2TError
from l2t_fast.files import at_home

_MOST = 4 * 2**30  # bytes of resized images
_MOST_CLASSES = 10**6  # of a split file


@dataclass(frozen=True)
class Data:
    """The three parts of a data set.

    image_shape: (3, H, W) of a batch's images. skipped: files of the whole data set that were left out.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    num_classes: int
    image_shape: tuple[int, int, int]
    skipped: tuple[str, ...] = ()

    def checksum(self) -> str:
        """Of all images and labels; of images in files, of their names."""
        return f"{self.test.checksum(self.val.checksum(self.train.checksum())):08x}"

    def sample(self) -> str:
        """A checksum of what some of the images in files hold."""
        return f"{self.test.sample(self.val.sample(self.train.sample())):08x}"


def load_data(config: DataConfig, seed: int) -> Data:
    """The data set that `config` names, split; `seed` chooses only the `per_class` images.

    Validation is what the data set itself has for it, or else a fixed stratified part of the training set, the same
    for every seed; limited data are drawn from what is left of it (validation is limited likewise), and fewer images
    per class are a subset of more. Only the training part is augmented. Images are resized after they are chosen.

    Raises L2TError when the data set is unknown, missing or damaged, has not the classes, images or split asked for,
    or does not fit in memory at the size asked for.
    """
    _check(config)
    if not isinstance(seed, int):
        raise L2TError(f"the seed must be a whole number, not {shown(seed)}.")
    train, test, num_classes, held_out = whole_sets(config)
    skip = config.on_bad_image == "skip"
    good = [images.readable() if skip else torch.ones(len(images), dtype=torch.bool) for images in (train, test)]
    if config.split is not None:
        classes, *parts = _read_split(config.split, train.labels, test.labels)
        train_part, val_part, test_part = (p[kept[p]] for p, kept in zip(parts, (good[0], *good), strict=True))
    else:
        classes = tuple(range(num_classes)) if config.classes is None else config.classes
        if not all(0 <= c < num_classes for c in classes):
            raise L2TError(f"{config.dataset} has classes 0 to {num_classes - 1}; choose classes among them.")
        pool, test_part = (
            (torch.isin(s.labels, torch.tensor(classes)) & kept).nonzero()[:, 0]
            for s, kept in zip((train, test), good, strict=True)
        )
        if held_out is not None:
            own = pool < len(train) - held_out
            val_part, train_part = pool[~own], pool[own]
        else:
            val_part, train_part = _draw(
                train.labels, pool, classes, lambda n: max(0, min(round(config.val_fraction * n), n - 1)), VALIDATION
            )
    if config.per_class is not None:
        k = config.per_class
        for c in classes:
            count = int((train.labels[train_part] == c).sum())
            if count < k:
                raise L2TError(
                    f"class {c} of {config.dataset} has {count} training images beside the validation images, "
                    f"fewer than the {k} per class asked for; ask for at most {count}."
                )
        train_part, _ = _draw(train.labels, train_part, classes, lambda _: k, PER_CLASS, seed)
        val_part, _ = _draw(train.labels, val_part, classes, lambda n: min(n, k), PER_CLASS, seed)

    there, taken = (set(labels.unique().tolist()) for labels in (train.labels, train.labels[train_part]))
    if without := set(classes) & there - taken:
        raise L2TError(f"class {min(without)} of {config.dataset} has no training images that can be taken; add some.")
    if not len(test_part):
        raise L2TError(f"{config.dataset} has no test images of the classes asked for; add some.")
    relabel = torch.full((max(num_classes, max(classes) + 1),), -1)
    relabel[list(classes)] = torch.arange(len(classes))

    size = config.image_size
    if size is not None and config.dataset == "folder" and size >= LARGE:
        size = None  # its images stay in files
    if size is not None:
        _check_memory(config.dataset, len(train_part) + len(val_part) + len(test_part), size)

    def part(images: ImageSet, indices: Tensor, augment: bool) -> ImageSet:
        chosen = images.select(indices, relabel[images.labels[indices]], augment)
        return chosen if size is None else chosen.resized(size)

    for_training = part(train, train_part, augment=True)
    return Data(
        train=for_training,
        val=part(train, val_part, augment=False),
        test=part(test, test_part, augment=False),
        num_classes=len(classes),
        image_shape=for_training.image_shape,
        skipped=tuple(itertools.chain.from_iterable(map(_left_out, (train, test), good))),
    )


def _left_out(images: ImageSet, good: Tensor) -> list[str]:
    return [images.paths[i] for i in (~good).nonzero()[:, 0].tolist()] if isinstance(images, FolderSet) else []


def _check(config: DataConfig) -> None:
    if not isinstance(config.dataset, str) or config.dataset not in DATASETS:
        nearest = ", ".join(difflib.get_close_matches(str(config.dataset).lower(), DATASETS, n=3, cutoff=0.0))
        raise L2TError(f"there is no data set named {config.dataset!r}; the nearest names are {nearest}.")
    if not isinstance(config.data_root, str | PathLike):
        raise L2TError(f"data_root must be a path, not {shown(config.data_root)}.")
    if config.classes is not None and not (
        isinstance(config.classes, Sequence)
        and all(isinstance(c, int) for c in config.classes)
        and 0 < len(set(config.classes)) == len(config.classes)
    ):
        raise L2TError(f"classes must be different and at least one, not {shown(config.classes)}.")
    if config.classes is not None and config.split is not None:
        raise L2TError("a split names its own classes; give either classes or a split.")
    if not isinstance(config.val_fraction, int | float) or not 0 <= config.val_fraction < 1:
        raise L2TError(f"val_fraction must be at least 0 and less than 1, not {shown(config.val_fraction)}.")
    if config.on_bad_image not in ("stop", "skip"):
        raise L2TError(f"on_bad_image must be 'stop' or 'skip', not {shown(config.on_bad_image)}.")
    for name in ("per_class", "workers", "image_size"):
        value = getattr(config, name)
        if value is not None and not within(name, value):
            least = BOUNDS[name][0]
            wanted = f"at least {least}" if isinstance(value, int) and value < least else allowed(name)
            raise L2TError(f"{name} must be {wanted}, not {shown(value)}.")
    if config.image_size is not None and config.dataset not in RESIZED:
        raise L2TError(
            f"{config.dataset} has images of one size; leave out image_size, which {' and '.join(RESIZED)} have."
        )


def _check_memory(name: str, count: int, size: int) -> None:
    """Raises L2TError where so many images, uint8 [3, size, size], are more than is kept in memory."""
    if (needed := count * 3 * size**2) > _MOST:
        raise L2TError(
            f"{count} images of {name} at {size} x {size} take {needed / 2**30:.1f} GiB of memory, more than the "
            f"{_MOST / 2**30:.0f} allowed; give a smaller image_size, or take fewer images."
        )


def whole_sets(config: DataConfig) -> tuple[ImageSet, ImageSet, int, int | None]:
    """The whole training set, the whole test set, the number of classes, and how many of the last training images are
    for validation, None where the data set does not say."""
    train, test, num_classes = read_dataset(config.dataset, config.data_root, config.download)
    if test is None:  # half of each class, drawn once and for all
        test_part, train_part = _draw(
            train.labels, torch.arange(len(train.labels)), range(num_classes), lambda n: n // 2, TEST
        )
        assert isinstance(train.images, Tensor)
        train, test = (Labelled(train.labels[i], train.images[i]) for i in (train_part, test_part))

    def images(part: Labelled, augment: bool) -> ImageSet:
        if isinstance(part.images, Tensor):
            return TensorSet(part.labels, augment, images=part.images, flip=READERS[config.dataset].flip)
        size = config.image_size or DATASETS[config.dataset]
        return FolderSet(part.labels, augment, paths=part.images, size=size, workers=config.workers)

    return images(train, augment=True), images(test, augment=False), num_classes, train.held_out


def _read_split(prefix: str, train: Tensor, test: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The classes, and the indices of train, val and test, of the authors' three split files."""
    found: list[tuple[tuple[int, ...], Tensor]] = []
    for part, labels in (("train", train), ("val", train), ("test", test)):
        path = at_home(Path(f"{prefix}-{part}"))
        if not path.is_file():
            raise L2TError(f"there is no split file {path}; give the common beginning of three split files.")
        try:
            classes, indices = torch.load(path, weights_only=True)
            found.append((_whole(classes), torch.tensor(_whole(indices), dtype=torch.int64)))
            if not classes or min(classes) < 0 or max(classes) >= _MOST_CLASSES or len(set(classes)) < len(classes):
                raise ValueError("classes must be different and not negative")
        except Exception as error:  # on bytes of any origin the unpickler may raise anything
            raise L2TError(f"{path} is no torch-saved (classes, indices) of integers; get it again.") from error
        classes, indices = found[-1]
        if classes != found[0][0]:
            raise L2TError(f"{path} names other classes than {prefix}-train; use three files of one split.")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(labels):
            raise L2TError(
                f"{path} names images that are not among the {len(labels)} of the data set; "
                "use it with the data set that it was made for."
            )
        if len(indices.unique()) < len(indices):
            raise L2TError(f"{path} names an image twice; get it again.")
        if not torch.isin(labels[indices], torch.tensor(classes)).all():
            raise L2TError(
                f"{path} names images of classes that it does not list; use it with the data set that it was made for."
            )
    return found[0][0], found[0][1], found[1][1], found[2][1]


def _whole(numbers: Sequence[Any]) -> tuple[int, ...]:
    """Raises TypeError where one is no whole number: it would be cut to one."""
    found = tuple(map(operator.index, numbers))
    if any(isinstance(number, bool) for number in numbers):
        raise TypeError("not numbers")
    return found


def _draw(
    labels: Tensor, pool: Tensor, classes: Sequence[int], count: Callable[[int], int], *key: int
) -> tuple[Tensor, Tensor]:
    """`count(n)` of the n images of each class in `pool`, at random by (key, class), and the rest of `pool`.

    labels: int64 [N] of all images; pool and both results: int64 indices of images, in the order of `pool`.
    """
    taken = torch.zeros(len(labels), dtype=torch.bool)  # [N]
    for c in classes:
        members = pool[labels[pool] == c]
        order = torch.randperm(len(members), generator=keyed_generator(*key, c))
        taken[members[order[: count(len(members))]]] = True
    return pool[taken[pool]], pool[~taken[pool]]
