"""Data sets in one file of arrays: read as they are, or refused by the names of file and array."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l2t_fast.data.images import TensorSet
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import load_data
from l2t_fast.errors import L2TError
from tests.data.samples import normalised, write_npz

KEYS = [f"{part}_{what}" for part in ("train", "val", "test") for what in ("images", "labels")]


def refusal(path: Path) -> str:
    """The one sentence that a file is refused with."""
    with pytest.raises(L2TError) as caught:
        load_data(DataConfig(dataset="npz", data_root=path), seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("column", [False, True])
def test_the_arrays_are_the_parts(channels: int, column: bool, tmp_path: Path) -> None:
    arrays = write_npz(tmp_path / "mini.npz", channels=channels, column=column)
    data = load_data(DataConfig(dataset="npz", data_root=tmp_path / "mini.npz"), seed=0)
    assert (data.num_classes, data.image_shape) == (3, (3, 12, 12))
    assert (data.train.augment, data.val.augment, data.test.augment) == (True, False, False)
    for part in ("train", "val", "test"):
        images = getattr(data, part)
        assert isinstance(images, TensorSet)
        expected = arrays[f"{part}_images"].reshape(-1, 12, 12, channels).transpose(0, 3, 1, 2)
        assert torch.equal(images.images, torch.from_numpy(expected))
        assert images.labels.tolist() == arrays[f"{part}_labels"].ravel().tolist()
        x = torch.cat([x for x, _ in images.eval_batches(4)])
        torch.testing.assert_close(x, normalised(images.images))


def test_validation_images_are_limited_and_chosen_by_class(tmp_path: Path) -> None:
    arrays = write_npz(tmp_path / "mini.npz")
    config = DataConfig(dataset="npz", data_root=tmp_path / "mini.npz", val_fraction=0.5)
    assert len(load_data(config, seed=0).val) == 9  # no part of the training images
    few = load_data(dataclasses.replace(config, per_class=2), seed=0)
    assert [torch.bincount(part.labels).tolist() for part in (few.train, few.val)] == [[2, 2, 2], [2, 2, 2]]
    other = load_data(dataclasses.replace(config, per_class=2), seed=1)
    assert isinstance(few.train, TensorSet)
    assert isinstance(other.train, TensorSet)
    assert not torch.equal(few.train.images, other.train.images)
    chosen = load_data(dataclasses.replace(config, classes=(2, 0)), seed=0)
    assert isinstance(chosen.val, TensorSet)
    old = arrays["val_labels"].ravel()
    assert torch.equal(chosen.val.images[:, 0], torch.from_numpy(arrays["val_images"][old != 1]))
    assert chosen.val.labels.tolist() == [{2: 0, 0: 1}[label] for label in old[old != 1].tolist()]
    with pytest.raises(L2TError, match="class 0 of npz has 6 training images"):
        load_data(dataclasses.replace(config, per_class=7), seed=0)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "absent.npz")
    assert "--data-root FILE.npz" in refusal(tmp_path)
    path = tmp_path / "odd.npz"
    write_npz(path)
    whole = path.read_bytes()
    for content in (b"", b"words", whole[:200], whole[:-40], pickle.dumps([1]), b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        assert "is no npz file" in refusal(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert "is no npz file" in refusal(path)
    place = whole.index(b"val_images.npy") + 300  # in the bytes of that array
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    assert f"val_images of {path} cannot be read" in refusal(path)


@pytest.mark.parametrize("key", KEYS)
def test_every_array_must_be_there_and_plain(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mini.npz"
    arrays = write_npz(path)
    np.savez(path, **{name: array for name, array in arrays.items() if name != key})
    assert refusal(path).startswith(f"{path} has no {key};")
    objects: Any = {**arrays, key: np.array([{"a": 1}], dtype=object)}
    np.savez(path, **objects)
    assert f"{key} of {path} cannot be read" in refusal(path)  # nothing is unpickled


@pytest.mark.parametrize(
    ("key", "array", "words"),
    [
        ("train_images", np.zeros((18, 12, 12), np.float32), "are float32 [18, 12, 12]; give uint8"),
        ("test_images", np.zeros((10, 12), np.uint8), "are uint8 [10, 12]; give uint8"),
        ("val_images", np.zeros((9, 12, 12, 4), np.uint8), "are uint8 [9, 12, 12, 4]; give uint8"),
        ("val_images", np.zeros((0, 12, 12), np.uint8), "are uint8 [0, 12, 12]; give uint8"),
        ("test_images", np.zeros((10, 12, 12, 12, 3), np.uint8), "[N, H, W] or [N, H, W, 3]"),
        ("val_images", np.zeros((9, 12, 11), np.uint8), "are 12 x 11, 1 channel, train_images 12 x 12, 1 channel"),
        ("test_images", np.zeros((10, 12, 12, 3), np.uint8), "12 x 12, 3 channels, train_images 12 x 12, 1 channel"),
        ("train_labels", np.zeros(18), "are float64 [18]; give integers from 0, one for each of the 18 images"),
        ("train_labels", np.zeros((18, 14), np.uint8), "are uint8 [18, 14]; give integers"),
        ("val_labels", np.zeros(8, np.int64), "are int64 [8]; give integers from 0, one for each of the 9 images"),
        ("test_labels", np.full(10, -1), "give integers from 0"),
        ("train_labels", np.arange(18) % 3 * 2, "leave out a class; number the classes 0, 1, 2"),
        ("val_labels", np.full(9, 3), "have class 3, train_labels only 0 to 2"),
        ("test_labels", np.full(10, 2**63, np.uint64), "give integers from 0"),
    ],
)
def test_arrays_of_another_kind_are_refused(key: str, array: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mini.npz"
    np.savez(path, **{**write_npz(path), key: array})
    message = refusal(path)
    assert message.startswith(f"{key} of {path}")
    assert words in message


def test_an_array_that_is_there_twice(tmp_path: Path) -> None:
    """Readers differ in which of them they take."""
    path = tmp_path / "mini.npz"
    write_npz(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("val_labels.npy", archive.read("val_labels.npy"))
    assert refusal(path) == f"{path} has val_labels twice; keep one of them."


def test_arrays_larger_than_memory_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mini.npz"
    arrays = write_npz(path)
    np.savez_compressed(path, **{**arrays, "train_images": np.zeros((18, 1000, 1000), np.uint8)})
    assert path.stat().st_size < 10**5
    monkeypatch.setattr("l2t_fast.data.readers.npz.host_memory", lambda: (17 * 2**20, 2**30))
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda file, key: pytest.fail("it was unpacked"))
    assert "take 0.0 GiB, and 0.0 GiB of memory are free; take fewer or smaller images" in refusal(path)
