"""Images of every mode, and files in a folder of images that are none: read rightly, or refused by name."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l2t_fast.data.options import DataConfig
from l2t_fast.data.readers.layout import open_image
from l2t_fast.data.splits import load_data
from l2t_fast.errors import L2TError
from tests.data.samples import rng, write_folder

GRADIENT = np.linspace(0, 65535, 40 * 50).reshape(40, 50)
IN_EIGHT = np.round(GRADIENT / 257).astype(np.uint8)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_are_scaled_from_65535(tmp_path: Path, name: str) -> None:
    Image.fromarray(GRADIENT.round().astype(np.uint16)).save(tmp_path / name)
    found = np.asarray(open_image(str(tmp_path / name)))
    assert found.shape == (40, 50, 3)
    assert (found == IN_EIGHT[:, :, None]).all()


def test_big_endian_sixteen_bits(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (50, 40), GRADIENT.round().astype(">u2").tobytes()).save(tmp_path / "x.tif")
    assert (np.asarray(open_image(str(tmp_path / "x.tif"))) == IN_EIGHT[:, :, None]).all()


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *((mode, "x.png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *((mode, "x.tif") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")),
        ("CMYK", "x.jpg"),
    ],
)
def test_modes_that_are_converted(tmp_path: Path, mode: str, name: str) -> None:
    """As Pillow converts them: what each stands for, within the rounding of its palette or its compression."""
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:8, :, 0] = colours[:, 8:, 2] = 255
    gray = mode in ("1", "L", "LA")
    wanted = np.asarray(Image.fromarray(colours).convert("1" if mode == "1" else "L").convert("RGB"))
    Image.fromarray(colours).convert("P" if mode == "PA" else mode).convert(mode).save(tmp_path / name)
    found = np.asarray(open_image(str(tmp_path / name))).astype(int)
    assert np.abs(found - (wanted if gray else colours)).mean() < 4


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_that_are_refused(tmp_path: Path, mode: str) -> None:
    """Integers of 32 bits and floats have no range of their own."""
    image = Image.new("LAB", (9, 9)) if mode == "LAB" else Image.fromarray(GRADIENT).convert(mode)
    image.save(tmp_path / "x.tif")
    with pytest.raises(L2TError, match=rf"x.tif has mode {mode} \(TIFF\), which is no image of 8 or 16 bits a channel"):
        open_image(str(tmp_path / "x.tif"))


def test_twelve_bits_are_refused(tmp_path: Path) -> None:
    """Pillow has them as it has 16, which would make them dark."""
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "x.tif", tiffinfo={258: 12})
    content = (tmp_path / "x.tif").read_bytes()
    tag = content.index(struct.pack("<HHI", 258, 3, 1))
    (tmp_path / "x.tif").write_bytes(content[: tag + 8] + struct.pack("<H", 12) + content[tag + 10 :])
    with pytest.raises(L2TError, match=r"x.tif has mode I;16 \(TIFF\)"):
        open_image(str(tmp_path / "x.tif"))


def write_tiff(path: Path, values: bytes, **tags: int) -> None:
    """A gray TIFF of 2 x 2, with these tags beside those that it needs."""
    bits = 8 * len(values) // 4
    fields = {256: 2, 257: 2, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 2, 279: len(values)}
    fields |= {int(tag.removeprefix("tag")): value for tag, value in tags.items()}
    fields[273] = 14 + 12 * len(fields)  # where the values are
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(fields.items()))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + values)


@pytest.mark.parametrize(
    ("values", "tags", "words"),
    [
        (struct.pack("<4H", 0, 1, 2, 65535), {"tag262": 0}, r"mode I;16 \(TIFF\) and 0 for white"),
        (struct.pack("4b", -128, -1, 0, 127), {"tag339": 2}, r"mode L \(TIFF\) and signed values"),
        (struct.pack("<4h", -9, -1, 0, 9), {"tag339": 2}, r"mode I \(TIFF\), which is no image of 8 or 16 bits"),
    ],
)
def test_values_that_mean_something_else_are_refused(
    tmp_path: Path, values: bytes, tags: dict[str, int], words: str
) -> None:
    """Pillow reads both as if the tag were not there."""
    write_tiff(tmp_path / "x.tif", values)
    open_image(str(tmp_path / "x.tif"))
    write_tiff(tmp_path / "x.tif", values, **tags)
    with pytest.raises(L2TError, match=f"x.tif has {words}"):
        open_image(str(tmp_path / "x.tif"))


def test_zero_for_white_in_eight_bits(tmp_path: Path) -> None:
    write_tiff(tmp_path / "x.tif", bytes([0, 255, 0, 255]), tag262=0)
    assert np.asarray(open_image(str(tmp_path / "x.tif")))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("size", [(1, 1001), (60_000, 59)])
def test_an_image_that_grows_when_it_is_resized_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    """A file of 60 kB, 256 pixels wide, takes 12 GB."""
    Image.new("L", size).save(tmp_path / "x.png")
    with pytest.raises(L2TError, match=rf"x.png is {size[0]} x {size[1]}, one side more than 1000 times the other"):
        open_image(str(tmp_path / "x.png"))
    Image.new("L", (1, 1000)).save(tmp_path / "x.png")
    assert open_image(str(tmp_path / "x.png")).size == (1, 1000)


def test_a_program_that_draws_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the name of the file."""
    trap = tmp_path / "bin/gs"
    trap.parent.mkdir()
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    trap.chmod(0o755)
    monkeypatch.setenv("PATH", f"{trap.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(L2TError, match=r"x.jpg is a program that draws an image \(EPS\), which is not run"):
        open_image(str(tmp_path / "x.jpg"))
    assert not (tmp_path / "executed").exists()


def test_a_decompression_bomb_is_named(tmp_path: Path) -> None:
    """A PNG of 14,000 x 14,000 says so in its header; nothing of it is unpacked."""
    header = struct.pack(">IIBBBBB", 14_000, 14_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    with pytest.raises(L2TError, match=r"x.png has more than 178,956,970 pixels, the most that is read; make it sm"):
        open_image(str(tmp_path / "x.png"))


@pytest.mark.parametrize("kind", ["png", "tif", "jpg", "gif", "bmp", "webp", "ppm"])
def test_damaged_images_are_refused_or_read(tmp_path: Path, kind: str) -> None:
    """Whatever is changed or cut off, there is an image or one sentence."""
    path = tmp_path / f"x.{kind}"
    Image.fromarray(rng().integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    content, refused = path.read_bytes(), []
    for seed in range(60):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng(seed).integers(0, min(len(content), 200), 5)] = rng(seed).integers(0, 256, 5)
        path.write_bytes(damaged.tobytes()[: len(content) if seed % 2 else 10 * seed + 1])
        try:
            assert open_image(str(path)).mode == "RGB"
        except L2TError as error:
            refused.append(str(error))
    assert refused
    assert all(str(path) in error for error in refused)


@pytest.mark.parametrize(
    ("place", "to"),
    [
        ("train/a/again", ".."),  # back into the tree: each image once more at every turn
        ("train/b/a", "../a"),  # under another label
        ("train/a/9.png", "/etc/hostname"),
        ("train/a/9.png", "0.png"),
        ("train/c", "a"),
        ("test", "train"),
    ],
)
def test_links_in_a_folder_of_images_are_refused(tmp_path: Path, place: str, to: str) -> None:
    write_folder(tmp_path, ("train",) if place == "test" else ("train", "test"))
    (tmp_path / place).symlink_to(to)
    with pytest.raises(L2TError) as refused:
        load_data(DataConfig(dataset="folder", data_root=tmp_path), 0)
    assert str(refused.value) == f"{tmp_path / place} is a link to {to}; put the files there instead."


def test_a_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    write_folder(tmp_path / "there")
    (tmp_path / "here").symlink_to("there")
    assert len(load_data(DataConfig(dataset="folder", data_root=tmp_path / "here"), 0).test) == 8


@pytest.mark.parametrize("place", [".ipynb_checkpoints", "a/.ipynb_checkpoints"])
def test_hidden_folders_are_refused(tmp_path: Path, place: str) -> None:
    """Copies in them would be a class of their own, or images twice."""
    write_folder(tmp_path)
    for part in ("train", "test"):
        (tmp_path / part / place).mkdir()
        (tmp_path / part / place / "0.png").write_bytes((tmp_path / part / "a/0.png").read_bytes())
    with pytest.raises(L2TError, match=rf"train/{place} is hidden, and would be read as any other folder; remove it"):
        load_data(DataConfig(dataset="folder", data_root=tmp_path), 0)


def test_a_pipe_in_a_folder_of_images_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    os.mkfifo(tmp_path / "train/a/9.png")
    with pytest.raises(L2TError, match=r"9.png is neither a file nor a folder; remove it"):
        load_data(DataConfig(dataset="folder", data_root=tmp_path), 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_stop_or_are_skipped(tmp_path: Path, workers: int) -> None:
    write_folder(tmp_path, count=10)
    for path in ("train/a/3.png", "test/b/7.png"):
        (tmp_path / path).write_bytes((tmp_path / path).read_bytes()[:60])
    config = DataConfig(dataset="folder", data_root=tmp_path, image_size=16, workers=workers)
    with pytest.raises(L2TError, match=r"train/a/3.png is no readable image; replace or remove it"):
        load_data(config, 0)
    data = load_data(DataConfig(**{**vars(config), "on_bad_image": "skip"}), 0)
    assert data.skipped == (str(tmp_path / "train/a/3.png"), str(tmp_path / "test/b/7.png"))
    assert (len(data.train), len(data.val), len(data.test)) == (17, 2, 19)
    # As if those that are left out had never been there.
    for path in data.skipped:
        Path(path).unlink()
    for ours, theirs in zip(
        (data.train, data.val, data.test),
        (lambda d: (d.train, d.val, d.test))(load_data(config, 0)),
        strict=True,
    ):
        for (x, y), (u, v) in zip(ours.eval_batches(4), theirs.eval_batches(4), strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)


def test_code_in_a_split_file_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> object:
            return open, (str(tmp_path / "executed"), "w")

    for part in ("train", "val", "test"):
        torch.save(([0, 1], Malicious()), tmp_path / f"split-{part}")
    with pytest.raises(L2TError, match=r"split-train is no torch-saved \(classes, indices\) of integers"):
        load_data(DataConfig(split=str(tmp_path / "split")), 0)
    assert not (tmp_path / "executed").exists()
