"""Labelled images, in batches that are a pure function of seed, epoch and position."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from l2t_fast.data.loading import load
from l2t_fast.data.readers.layout import open_image
from l2t_fast.data.streams import AUGMENTATION, ORDER, keyed_generator
from l2t_fast.errors import L2TError

# Statistics of ImageNet, which the authors use for every data set.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAD = 4  # zero border of the random crop of small images
LabelledBatch = tuple[Tensor, Tensor]

_Transform = Callable[[Any], Any]  # of an image
_Key = tuple[int, ...] | None
_FLOAT = (transforms.ToTensor(), transforms.Normalize(MEAN, STD))
_DECODED = 64  # images that a process hands over at once
_LOOKED_INTO = 1000  # files, evenly spaced, whose content a checksum has


@dataclass(frozen=True)
class Part:
    """What one of several processes takes of each batch, which is divided into `parts` in all."""

    rank: int
    ranks: int
    parts: int

    def of(self, batch: range) -> range:
        """Its positions among those of a batch, which is divided as by `torch.tensor_split`."""
        size, rest = divmod(len(batch), self.ranks)
        begin, end = (i * size + min(i, rest) for i in (self.rank, self.rank + 1))
        return batch[begin:end]


WHOLE = Part(rank=0, ranks=1, parts=1)


@dataclass(frozen=True, eq=False)
class ImageSet(ABC):
    """Labelled images. labels: int64 [N]. augment: whether `batches` augments (training sets do)."""

    labels: Tensor
    augment: bool

    def __len__(self) -> int:
        return len(self.labels)

    def num_batches(self, batch_size: int, parts: int = 1) -> int:
        """Batches of one epoch. A trailing batch without TWO images for each of its parts is dropped: BatchNorm cannot
        train on one."""
        if batch_size < 1:
            raise L2TError(f"the batch size must be at least 1, not {batch_size}.")
        full, rest = divmod(len(self), batch_size)
        return full + (rest >= 2 * parts)

    @abstractmethod
    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[LabelledBatch]:
        """One shuffled epoch from batch `start` on: x float32 [B, 3, H, W], normalised, and y int64 [B].

        A pure function of (seed, epoch, position): `start=k` gives what the whole epoch gives from its batch k on,
        without preparing the first k. There are `num_batches(batch_size, part.parts) - start` of them. Global random
        generators are neither read nor changed.

        Args:
            part: the piece of each batch that is wanted; the others are not prepared.
        """

    @abstractmethod
    def eval_batches(self, batch_size: int) -> Iterator[LabelledBatch]:
        """Every image once, in order, without augmentation: x float32 [B, 3, H, W], normalised, y int64 [B]."""

    def checksum(self, so_far: int = 0) -> int:
        """Of labels and images; of images in files, of their names."""
        return zlib.crc32(self.labels.cpu().numpy().tobytes(), so_far)

    def sample(self, so_far: int = 0) -> int:
        """A checksum of what images in files hold, of up to a thousand of them."""
        return so_far

    def readable(self) -> Tensor:
        """bool [N]: which images can be read. Those in files are all looked at."""
        return torch.ones(len(self), dtype=torch.bool)

    @abstractmethod
    def select(self, indices: Tensor, labels: Tensor, augment: bool) -> ImageSet:
        """The images at `indices` (int64 [K]) with these labels (int64 [K])."""

    @abstractmethod
    def resized(self, size: int) -> TensorSet:
        """The same images at size x size, in memory."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of a batch's images."""

    @abstractmethod
    def to(self, device: torch.device | str) -> ImageSet:
        """The same images, with batches on `device`."""

    def _spans(self, batch_size: int, start: int, part: Part) -> list[range]:
        """Positions in the shuffled order that the part has of batches start, start + 1, ..."""
        end = min(self.num_batches(batch_size, part.parts) * batch_size, len(self))
        begins = range(start * batch_size, end, batch_size)
        return [part.of(range(begin, min(begin + batch_size, end))) for begin in begins]


@dataclass(frozen=True, eq=False)
class TensorSet(ImageSet):
    """Small images in memory. images: uint8 [N, C, H, W], C = 1 (gray, shown as 3 equal channels) or 3.

    Augmentation, as the authors: a zero border of 4 pixels, a random crop of the old size, and with `flip` a
    horizontal flip with probability 1/2.
    """

    images: Tensor
    flip: bool

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[LabelledBatch]:
        return _beside(self._batches(self._spans(batch_size, start, part), seed, epoch), self.images.device)

    def _batches(self, spans: Sequence[range], seed: int, epoch: int) -> Iterator[LabelledBatch]:
        n, device = len(self), self.images.device
        # Drawn for the whole epoch at once, so that any batch can be the first; on the CPU, alike for all devices.
        generator = keyed_generator(ORDER, seed, epoch)
        order = torch.randperm(n, generator=generator).to(device)  # [N]
        shift = torch.randint(2 * PAD + 1, (n, 2), generator=generator).to(device)  # [N, 2]
        flipped = (torch.rand(n, generator=generator) < 0.5).to(device)  # [N]
        normalise = _normaliser(device)
        for span in spans:
            now = slice(span.start, span.stop)
            x = self.images[order[now]]  # [B, C, H, W]
            if self.augment:
                x = _crop(x, shift[now], flipped[now] if self.flip else None)
            yield normalise(x), self.labels[order[now]]

    def eval_batches(self, batch_size: int) -> Iterator[LabelledBatch]:
        normalise = _normaliser(self.images.device)
        for x, y in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            if len(y):
                yield normalise(x), y

    def select(self, indices: Tensor, labels: Tensor, augment: bool) -> TensorSet:
        return TensorSet(labels=labels, augment=augment, images=self.images[indices], flip=self.flip)

    def checksum(self, so_far: int = 0) -> int:
        return zlib.crc32(self.images.cpu().contiguous().numpy().data, super().checksum(so_far))

    def resized(self, size: int) -> TensorSet:
        if self.images.shape[2:] == (size, size):
            return self
        images = self.images.new_empty(len(self), self.images.shape[1], size, size)
        for begin in range(0, len(self), 1024):
            now = slice(begin, begin + 1024)
            images[now] = F.interpolate(self.images[now], size=size, mode="bilinear", antialias=True)
        return dataclasses.replace(self, images=images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.images.shape[2], self.images.shape[3]

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

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[LabelledBatch]:
        order = torch.randperm(len(self), generator=keyed_generator(ORDER, seed, epoch))  # [N]
        key = (AUGMENTATION, seed, epoch) if self.augment else None
        size = self.size
        shape = (
            [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()] if self.augment else _centre(size)
        )
        spans = self._spans(batch_size, start, part)
        batches = self._load(order, [*shape, *_FLOAT], spans, key)
        return _beside(batches, self.labels.device)

    def eval_batches(self, batch_size: int) -> Iterator[LabelledBatch]:
        return self._load(torch.arange(len(self)), [*_centre(self.size), *_FLOAT], batch_size)

    def checksum(self, so_far: int = 0) -> int:
        names = "\0".join("/".join(path.replace("\\", "/").split("/")[-2:]) for path in self.paths)
        return zlib.crc32(names.encode("utf-8", "surrogateescape"), super().checksum(so_far))

    def sample(self, so_far: int = 0) -> int:
        for path in self.paths[:: 1 + len(self) // _LOOKED_INTO]:
            with suppress(OSError):  # it is said when the image is read
                so_far = zlib.crc32(Path(path).read_bytes(), so_far)
        return so_far

    def readable(self) -> Tensor:
        return _readable(tuple(self.paths), self.workers)

    def select(self, indices: Tensor, labels: Tensor, augment: bool) -> FolderSet:
        paths = [self.paths[i] for i in indices.tolist()]
        return dataclasses.replace(self, paths=paths, labels=labels, augment=augment)

    def resized(self, size: int) -> TensorSet:
        images = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
        shape = [transforms.Resize((size, size)), transforms.PILToTensor()]
        for i, (x, _) in enumerate(self._load(torch.arange(len(self)), shape, _DECODED)):
            images[i * _DECODED : (i + 1) * _DECODED] = x
        return TensorSet(labels=self.labels, augment=self.augment, images=images, flip=True)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    def to(self, device: torch.device | str) -> FolderSet:
        return dataclasses.replace(self, labels=self.labels.to(device))

    def _load(
        self, order: Tensor, shape: Sequence[_Transform], batches: int | Sequence[range], key: _Key = None
    ) -> Iterator[LabelledBatch]:
        device = self.labels.device
        labels = self.labels.tolist()
        samples = [(self.paths[i], labels[i]) for i in order.tolist()]
        files = _Files(samples, shape, key)
        for x, y in load(files, batches, self.workers, pin=device.type == "cuda"):
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _beside(batches: Iterator[LabelledBatch], device: torch.device) -> Iterator[LabelledBatch]:
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


def _centre(size: int) -> list[_Transform]:
    return [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]


@functools.lru_cache(maxsize=4)
def _readable(paths: tuple[str, ...], workers: int) -> Tensor:
    """As `ImageSet.readable`; once in a process, as it takes as long as an epoch."""
    found = load(_Tried(paths), _DECODED, workers)
    return torch.cat([torch.empty(0, dtype=torch.bool), *found])


class _Tried(Dataset[bool]):
    """Whether the images in files can be read."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bool:
        try:
            open_image(self.paths[index])
        except L2TError:
            return False
        return True


class _Files(Dataset[tuple[Tensor, int]]):
    """Decoded images, put into `shape`; with a key, at random by (key, index) alone."""

    def __init__(self, samples: list[tuple[str, int]], shape: Sequence[_Transform], key: _Key) -> None:
        self.samples, self.key = samples, key
        self.transform = transforms.Compose(shape)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = open_image(path)
        if self.key is None:
            return self.transform(image), label
        # torchvision's transforms draw from the global CPU generator: seeded here, and put back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(keyed_generator(*self.key, index).get_state())
            return self.transform(image), label


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
