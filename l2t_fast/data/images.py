"""Data sets: train, validation and test part, with batches that are a pure function of seed, epoch, position."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from l2t_fast.data.options import DataConfig
from l2t_fast.data.readers import DATASETS, Part, open_image, read
from l2t_fast.errors import L2TError

# Statistics of ImageNet, which the authors use for every data set.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4  # zero border of the random crop of small images
Batch = tuple[Tensor, Tensor]

# The first number of every random key keeps the streams apart.
_TEST, _VAL, _FEW, _ORDER, _ITEM = range(5)


@dataclass(frozen=True, eq=False)
class ImageSet(ABC):
    """Labelled images. labels: int64 [N]. augment: whether `batches` augments (training sets do)."""

    labels: Tensor
    augment: bool

    def __len__(self) -> int:
        return len(self.labels)

    def num_batches(self, batch_size: int) -> int:
        """Batches of one epoch. A trailing batch of ONE image is dropped: BatchNorm cannot train on it."""
        if batch_size < 1:
            raise L2TError(f"the batch size must be at least 1, not {batch_size}.")
        full, rest = divmod(len(self), batch_size)
        return full + (rest > 1)

    @abstractmethod
    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """One shuffled epoch from batch `start` on: x float32 [B, 3, H, W], normalised, and y int64 [B].

        A pure function of (seed, epoch, position): `start=k` gives what the whole epoch gives from its batch k on,
        without preparing the first k. There are `num_batches(batch_size) - start` of them: a trailing batch of
        ONE image is dropped. The global random generators are neither read nor changed.
        """

    @abstractmethod
    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order, without augmentation: x float32 [B, 3, H, W], normalised, y int64 [B]."""

    @abstractmethod
    def select(self, indices: Tensor, labels: Tensor, augment: bool) -> ImageSet:
        """The images at `indices` (int64 [K]) with these labels (int64 [K])."""

    @abstractmethod
    def to(self, device: torch.device | str) -> ImageSet:
        """The same images, with batches on `device`."""

    def _span(self, batch_size: int, start: int) -> range:
        """Positions in the shuffled order that batches start, start + 1, ... cover."""
        return range(start * batch_size, min(self.num_batches(batch_size) * batch_size, len(self)))


@dataclass(frozen=True, eq=False)
class TensorSet(ImageSet):
    """Small images in memory. images: uint8 [N, C, H, W], C = 1 (gray, shown as 3 equal channels) or 3.

    Augmentation, as the authors: a zero border of 4 pixels, a random crop of the old size, and with `flip` a
    horizontal flip with probability 1/2.
    """

    images: Tensor
    flip: bool

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        return _beside(self._batches(self._span(batch_size, start), batch_size, seed, epoch), self.images.device)

    def _batches(self, span: range, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
        n, device = len(self), self.images.device
        # Drawn for the whole epoch at once, so that any batch can be the first; on the CPU, alike for all devices.
        generator = _generator(_ORDER, seed, epoch)
        order = torch.randperm(n, generator=generator).to(device)  # [N]
        shift = torch.randint(2 * PAD + 1, (n, 2), generator=generator).to(device)  # [N, 2]
        flipped = (torch.rand(n, generator=generator) < 0.5).to(device)  # [N]
        normalise = _normaliser(device)
        for begin in span[::batch_size]:
            now = slice(begin, begin + batch_size)
            x = self.images[order[now]]  # [B, C, H, W]
            if self.augment:
                x = _crop(x, shift[now], flipped[now] if self.flip else None)
            yield normalise(x), self.labels[order[now]]

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        normalise = _normaliser(self.images.device)
        for x, y in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            if len(y):
                yield normalise(x), y

    def select(self, indices: Tensor, labels: Tensor, augment: bool) -> TensorSet:
        return TensorSet(labels=labels, augment=augment, images=self.images[indices], flip=self.flip)

    def to(self, device: torch.device | str) -> TensorSet:
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, eq=False)
class FolderSet(ImageSet):
    """Images in files, decoded by `workers` processes as they are needed.

    Augmentation, as the authors: random resized crop to size x size and horizontal flip. Otherwise: resize (256
    for size 224), then centre crop.
    """

    paths: Sequence[str]
    size: int
    workers: int

    def batches(self, batch_size: int, *, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self), generator=_generator(_ORDER, seed, epoch))  # [N]
        key = (_ITEM, seed, epoch) if self.augment else None
        batches = self._load(order[self._span(batch_size, start)], batch_size, start * batch_size, key)
        return _beside(batches, self.labels.device)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        return self._load(torch.arange(len(self)), batch_size, 0, None)

    def select(self, indices: Tensor, labels: Tensor, augment: bool) -> FolderSet:
        paths = [self.paths[i] for i in indices.tolist()]
        return dataclasses.replace(self, paths=paths, labels=labels, augment=augment)

    def to(self, device: torch.device | str) -> FolderSet:
        return dataclasses.replace(self, labels=self.labels.to(device))

    def _load(self, order: Tensor, batch_size: int, first: int, key: tuple[int, ...] | None) -> Iterator[Batch]:
        device = self.labels.device
        labels = self.labels.tolist()
        samples = [(self.paths[i], labels[i]) for i in order.tolist()]
        loader = DataLoader(
            _Files(samples, self.size, first, key),
            batch_size=batch_size,
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise the loader draws from the global one
        )
        try:
            for x, y in loader:
                yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        except L2TError as error:  # a worker's message comes wrapped in its traceback
            raise L2TError(str(error).strip().rpartition("L2TError: ")[2]) from None


def _beside(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; on CUDA copied and augmented on a stream of their own, beside the iteration that runs.

    Whoever takes a batch waits for it on the device alone, so that the queue of iterations never runs dry.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # which may still write the images
    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
        if batch is None:
            return
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in batch:
            tensor.record_stream(current)  # its memory is not given away before the iteration has read it
        yield batch


class _Files(Dataset[tuple[Tensor, int]]):
    """Decoded images; with a key, augmented at random by (key, first + index) alone."""

    def __init__(self, samples: list[tuple[str, int]], size: int, first: int, key: tuple[int, ...] | None) -> None:
        self.samples, self.first, self.key = samples, first, key
        shape = (
            [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
            if key is None
            else [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        )
        self.transform = transforms.Compose(
            [*shape, transforms.ToTensor(), transforms.Normalize(MEAN, STD)],
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = open_image(path)
        if self.key is None:
            return self.transform(image), label
        # torchvision's transforms draw from the global CPU generator: seeded here, and put back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(_generator(*self.key, self.first + index).get_state())
            return self.transform(image), label


@dataclass(frozen=True)
class Data:
    """The three parts of a data set. image_shape: (3, H, W) of a batch's images."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    num_classes: int
    image_shape: tuple[int, int, int]


def load_data(config: DataConfig, seed: int) -> Data:
    """The data set that `config` names, split; `seed` chooses only the `per_class` images.

    Validation is a fixed stratified part of the training set, the same for every seed; limited data are drawn from
    what is left of it (validation is limited likewise), and fewer images per class are a subset of more. Only the
    training part is augmented.

    Raises L2TError when the data set is unknown, missing or damaged, or has not the classes, images or split asked
    for.
    """
    _check(config)
    train, test, num_classes = _read(config)
    if config.split is not None:
        classes, train_part, val_part, test_part = _read_split(config.split, train.labels, test.labels)
    else:
        classes = tuple(range(num_classes)) if config.classes is None else config.classes
        if not all(0 <= c < num_classes for c in classes):
            raise L2TError(f"{config.dataset} has classes 0 to {num_classes - 1}; choose classes among them.")
        pool, test_part = (torch.isin(s.labels, torch.tensor(classes)).nonzero()[:, 0] for s in (train, test))
        val_part, train_part = _draw(
            train.labels, pool, classes, lambda n: max(0, min(round(config.val_fraction * n), n - 1)), _VAL
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
        train_part, _ = _draw(train.labels, train_part, classes, lambda _: k, _FEW, seed)
        val_part, _ = _draw(train.labels, val_part, classes, lambda n: min(n, k), _FEW, seed)

    relabel = torch.full((max(num_classes, max(classes) + 1),), -1)
    relabel[list(classes)] = torch.arange(len(classes))

    def part(images: ImageSet, indices: Tensor, augment: bool) -> ImageSet:
        return images.select(indices, relabel[images.labels[indices]], augment)

    size = DATASETS[config.dataset].image_size
    return Data(
        train=part(train, train_part, augment=True),
        val=part(train, val_part, augment=False),
        test=part(test, test_part, augment=False),
        num_classes=len(classes),
        image_shape=(3, size, size),
    )


def _check(config: DataConfig) -> None:
    if config.dataset not in DATASETS:
        nearest = ", ".join(difflib.get_close_matches(config.dataset.lower(), DATASETS, n=3, cutoff=0.0))
        raise L2TError(f"there is no data set named {config.dataset!r}; the nearest names are {nearest}.")
    if config.classes is not None and not 0 < len(set(config.classes)) == len(config.classes):
        raise L2TError(f"classes must be different and at least one, not {config.classes}.")
    if config.classes is not None and config.split is not None:
        raise L2TError("a split names its own classes; give either classes or a split.")
    if config.per_class is not None and config.per_class < 1:
        raise L2TError(f"per_class must be at least 1, not {config.per_class}.")
    if not 0 <= config.val_fraction < 1:
        raise L2TError(f"val_fraction must be at least 0 and less than 1, not {config.val_fraction}.")
    if config.workers < 0:
        raise L2TError(f"workers must be at least 0, not {config.workers}.")


def _read(config: DataConfig) -> tuple[ImageSet, ImageSet, int]:
    """The whole training set, the whole test set, and the number of classes."""
    entry = DATASETS[config.dataset]
    train, test, num_classes = read(config.dataset, config.data_root, config.download)
    if test is None:  # half of each class, drawn once and for all
        test_part, train_part = _draw(
            train.labels, torch.arange(len(train.labels)), range(num_classes), lambda n: n // 2, _TEST
        )
        assert isinstance(train.images, Tensor)
        train, test = (Part(train.labels[i], train.images[i]) for i in (train_part, test_part))

    def images(part: Part, augment: bool) -> ImageSet:
        if isinstance(part.images, Tensor):
            return TensorSet(part.labels, augment, images=part.images, flip=entry.flip)
        return FolderSet(part.labels, augment, paths=part.images, size=entry.image_size, workers=config.workers)

    return images(train, augment=True), images(test, augment=False), num_classes


def _read_split(prefix: str, train: Tensor, test: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The classes, and the indices of train, val and test, of the authors' three split files."""
    found: list[tuple[tuple[int, ...], Tensor]] = []
    for part, labels in (("train", train), ("val", train), ("test", test)):
        path = Path(f"{prefix}-{part}").expanduser()
        if not path.is_file():
            raise L2TError(f"there is no split file {path}; give the common beginning of three split files.")
        try:
            classes, indices = torch.load(path, weights_only=True)
            found.append((tuple(map(int, classes)), torch.tensor(indices, dtype=torch.int64)))
            if not classes or min(classes) < 0 or len(set(classes)) < len(classes):
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
        if not torch.isin(labels[indices], torch.tensor(classes)).all():
            raise L2TError(
                f"{path} names images of classes that it does not list; use it with the data set that it was made for."
            )
    return found[0][0], found[0][1], found[1][1], found[2][1]


def _draw(
    labels: Tensor, pool: Tensor, classes: Sequence[int], count: Callable[[int], int], *key: int
) -> tuple[Tensor, Tensor]:
    """`count(n)` of the n images of each class in `pool`, at random by (key, class), and the rest of `pool`.

    labels: int64 [N] of all images; pool and both results: int64 indices of images, in the order of `pool`.
    """
    taken = torch.zeros(len(labels), dtype=torch.bool)  # [N]
    for c in classes:
        members = pool[labels[pool] == c]
        order = torch.randperm(len(members), generator=_generator(*key, c))
        taken[members[order[: count(len(members))]]] = True
    return pool[taken[pool]], pool[~taken[pool]]


def _generator(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded by all numbers of `key`."""
    if min(key) < 0:
        raise L2TError(f"seeds and epochs must be at least 0, not {min(key)}.")
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def _crop(x: Tensor, shift: Tensor, flipped: Tensor | None) -> Tensor:
    """Crops of x [B, C, H, W] inside a zero border of PAD, at shift [B, 2], mirrored where flipped [B]."""
    b, c, h, w = x.shape
    rows = shift[:, :1] + torch.arange(h, device=x.device)  # [B, H]
    cols = shift[:, 1:] + torch.arange(w, device=x.device)  # [B, W]
    if flipped is not None:
        cols = torch.where(flipped[:, None], cols.flip(1), cols)
    image = torch.arange(b, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return F.pad(x, [PAD] * 4)[image, channel, rows[:, None, :, None], cols[:, None, None, :]]


def _normaliser(device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 [B, 1 or 3, H, W] -> float32 [B, 3, H, W]; made once an epoch, as it copies to the device."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (MEAN, STD))  # [3, 1, 1]
    return lambda x: (x - mean) / std
