"""What all readers share: the parts of a data set, and lists of its files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from l2t_fast.errors import L2TError


class Labelled(NamedTuple):
    """A training or a test set. labels: int64 [N]; images: uint8 [N, C, H, W] with C = 1 or 3, or N paths.

    held_out: so many, its last ones, are for validation; None where the data set does not say.
    """

    labels: Tensor
    images: Tensor | list[str]
    held_out: int | None = None


TrainTest = tuple[Labelled, Labelled | None]  # for training and for testing
Listed = list[tuple[str, str]]  # class and path of each image, in any order
LabelledFiles = tuple[Tensor, list[str]]  # int64 [N], and N paths

_CONVERTED = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"))
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF: some have 12 bits in 16
_MOST_LONGER = 1000  # times: resized by its shorter side, an image has as much more pixels


class DamagedError(Exception):
    """Why a data set cannot be read; `read_dataset` adds which one, where, and how to get it."""


@dataclass(frozen=True)
class Reader:
    """What is known of a data set before it is read.

    read: (root, download) -> both parts. num_classes: 0 is to be counted. flip: mirror small training images.
    get: how to get it, with {command} for the command line that downloads it.
    """

    read: Callable[[Path, bool], TrainTest]
    num_classes: int = 10
    flip: bool = True
    get: str = "{command} gets it (remove a damaged copy first)"


def open_image(path: str) -> Image.Image:
    """The image in a file as 8-bit RGB: gray, palette and CMYK images too, and those of 16 bits, scaled from 65535.

    Raises L2TError when it cannot be read, has more than twice `Image.MAX_IMAGE_PIXELS` pixels or one side 1000 times
    as long as the other, has values whose range or sign Pillow does not see to (integers of 32 bits, floats, signed
    bytes), or is a program that draws one (EPS), which is not run.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of half that many pixels, and of damaged metadata
            image: Image.Image = Image.open(file)
            found = f"{image.mode} ({image.format})"
            if image.format == "EPS":
                raise L2TError(f"{path} is a program that draws an image (EPS), which is not run; save the image.")
            if max(image.size) > _MOST_LONGER * min(image.size):
                raise L2TError(
                    f"{path} is {image.width} x {image.height}, one side more than {_MOST_LONGER} times the other; cut "
                    "it, or remove it."
                )
            if odd := _misread(image):
                raise L2TError(f"{path} has mode {found} and {odd}; save it without, or remove it.")
            image = _sixteen_bits(image) if _is_sixteen_bits(image) else image
            if image.mode not in _CONVERTED:
                raise L2TError(
                    f"{path} has mode {found}, which is no image of 8 or 16 bits a channel; save it as one, or remove "
                    "it."
                )
            return image.convert("RGBA").convert("RGB") if image.mode == "RGBa" else image.convert("RGB")
    except L2TError:
        raise
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise L2TError(f"{path} has more than {most:,} pixels, the most that is read; make it smaller.") from None
    except MemoryError:
        raise L2TError(f"{path} does not fit in memory; make it smaller.") from None
    except Exception:  # on bytes of any origin the decoders may raise anything
        raise L2TError(f"{path} is no readable image; replace or remove it.") from None


def _misread(image: Image.Image) -> str:
    """What of a TIFF Pillow passes over, so that its values would mean something else; "" where there is nothing."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == 0:
        return "0 for white"
    signed = 2 in tuple(tags.get(_SAMPLE_FORMAT, (1,)))
    return "signed values" if signed and image.mode in _CONVERTED else ""


def _is_sixteen_bits(image: Image.Image) -> bool:
    """Whether its values go to 65535: some gray images of 16 bits Pillow opens as integers of 32."""
    if image.mode == "I":
        return image.format in ("PNG", "PPM")
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    return image.mode.startswith("I;16") and tuple(bits) == (16,)


def _sixteen_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)  # [H, W]
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def check_tree(folder: Path) -> None:
    """Raises L2TError where the folder, or something in it, is neither a folder nor a file, or is a hidden folder.

    Links, and the copies that notebooks keep, make images twice or of another class, and reading a pipe never ends.
    """
    if folder.is_symlink():
        raise _link(folder)
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise _link(Path(entry.path))
                if entry.is_dir():
                    if entry.name.startswith("."):
                        raise L2TError(f"{entry.path} is hidden, and would be read as any other folder; remove it.")
                    waiting.append(Path(entry.path))
                elif not entry.is_file():
                    raise L2TError(f"{entry.path} is neither a file nor a folder; remove it.")


def _link(path: Path) -> L2TError:
    return L2TError(f"{path} is a link to {os.readlink(path)}; put the files there instead.")


def ordered(train: Listed, test: Listed, num_classes: int) -> tuple[LabelledFiles, LabelledFiles]:
    """Both parts as torchvision's ImageFolder has them: classes by name, and the files of a class by name."""
    classes = sorted({c for c, _ in train})
    odd = set(classes) ^ {c for c, _ in test}
    if odd:
        raise DamagedError(f"class {min(odd)} is in one of the lists for training and testing only")
    if len(classes) != num_classes:
        raise DamagedError(f"its lists name {len(classes)} classes instead of {num_classes}")
    parts = []
    for listed in (train, test):
        listed = sorted(listed, key=lambda image: (image[0], os.path.basename(image[1])))
        missing = next((path for _, path in listed if not os.path.isfile(path)), None)
        if missing:
            raise DamagedError(f"{missing} is listed, but not there")
        number = {c: i for i, c in enumerate(classes)}
        parts.append((torch.tensor([number[c] for c, _ in listed]), [path for _, path in listed]))
    return parts[0], parts[1]


def unpacked(root: Path, folder: str) -> Path:
    """Where the data set lies: in `folder` under the root, or the root is that folder."""
    return root / folder if (root / folder).is_dir() else root


def lines(path: Path) -> list[str]:
    """The lines of a list, without those that are empty."""
    if not path.is_file():
        raise DamagedError(f"there is no {path}")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is no text") from error


def word_pairs(path: Path) -> dict[str, str]:
    """The first two words of each line of a list."""
    words = [line.split() for line in lines(path)]
    if any(len(line) < 2 for line in words):
        raise DamagedError(f"{path} has a line of one word")
    return {line[0]: line[1] for line in words}
