"""Images of folders and npz files at the size asked for, in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets, transforms

from l2t_fast.data.images import FolderSet, TensorSet
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import load_data
from l2t_fast.errors import L2TError
from tests.data.samples import SHARED, equal, normalised, write_npz


@pytest.mark.parametrize("size", [8, 32, 223])
def test_a_folder_of_small_images(folder: Path, size: int) -> None:
    config = DataConfig(dataset="folder", data_root=folder, val_fraction=0.2, workers=0, image_size=size)
    data = load_data(config, seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 10)
    assert (data.num_classes, data.image_shape) == (2, (3, size, size))
    resize = transforms.Compose([transforms.Resize((size, size)), transforms.PILToTensor()])
    expected = torch.stack([resize(image) for image, _ in datasets.ImageFolder(folder / "val")])
    assert isinstance(data.test, TensorSet)
    assert torch.equal(data.test.images, expected)
    assert data.test.labels.tolist() == [0] * 5 + [1] * 5
    (x, y), *_ = data.test.eval_batches(10)
    torch.testing.assert_close(x, normalised(expected))
    assert torch.equal(y, data.test.labels)
    # As of CIFAR: crops in a zero border, and mirrored ones.
    assert isinstance(data.train, TensorSet)
    assert (data.train.flip, data.train.augment, data.val.augment) == (True, True, False)


def test_the_images_of_a_small_folder_are_those_of_the_large_one(folder: Path) -> None:
    """Which are for training does not depend on the size; neither do they on the processes that read."""
    config = DataConfig(dataset="folder", data_root=folder, val_fraction=0, per_class=2, workers=0)
    large, small = (load_data(dataclasses.replace(config, image_size=size), seed=3) for size in (None, 16))
    assert isinstance(large.train, FolderSet)
    assert isinstance(small.train, TensorSet)
    resize = transforms.Compose([transforms.Resize((16, 16)), transforms.PILToTensor()])
    expected = torch.stack([resize(Image.open(path)) for path in large.train.paths])
    assert torch.equal(small.train.images, expected)
    assert (len(small.val), small.val.image_shape) == (0, (3, 16, 16))
    state = torch.get_rng_state()
    read_beside = load_data(dataclasses.replace(config, image_size=16, workers=2), seed=3)
    assert isinstance(read_beside.train, TensorSet)
    assert torch.equal(read_beside.train.images, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_at_224_and_above_stays_in_files(folder: Path) -> None:
    config = DataConfig(dataset="folder", data_root=folder, workers=0)
    usual, same, larger = (load_data(dataclasses.replace(config, image_size=size), seed=0) for size in (None, 224, 256))
    assert equal(
        list(usual.train.batches(3, seed=0, epoch=0)),
        list(same.train.batches(3, seed=0, epoch=0)),
    )
    assert larger.image_shape == (3, 256, 256)
    x, _ = next(larger.test.eval_batches(2))
    assert (type(larger.train), x.shape) == (FolderSet, (2, 3, 256, 256))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_in_a_small_folder(folder: Path, tmp_path: Path, workers: int) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a/0.png").write_bytes(
            (folder / "val/a/0.png").read_bytes()[: 100 if part == "test" else None]
        )
    with pytest.raises(L2TError) as caught:
        load_data(DataConfig(dataset="folder", data_root=tmp_path, workers=workers, image_size=32), seed=0)
    assert str(caught.value) == f"{tmp_path / 'test/a/0.png'} is no readable image; replace or remove it."


def test_what_does_not_fit_in_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(dataset="folder", data_root=folder, workers=0, image_size=32)
    monkeypatch.setattr("l2t_fast.data.splits._MOST", 20 * 3 * 32**2)
    load_data(config, seed=0)
    with pytest.raises(L2TError, match=r"20 images of folder at 33 x 33 take .* GiB of memory, more than"):
        load_data(dataclasses.replace(config, image_size=33), seed=0)
    load_data(dataclasses.replace(config, image_size=33, per_class=1), seed=0)  # only what is chosen is decoded
    load_data(dataclasses.replace(config, image_size=224), seed=0)


def test_sizes_that_are_refused(folder: Path) -> None:
    with pytest.raises(L2TError, match="image_size must be at least 8, not 7"):
        load_data(DataConfig(dataset="folder", data_root=folder, image_size=7), seed=0)
    with pytest.raises(L2TError, match="digits has images of one size; leave out image_size"):
        load_data(DataConfig(image_size=32), seed=0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 40])
def test_npz_images_are_resized(size: int, channels: int, tmp_path: Path) -> None:
    arrays = write_npz(tmp_path / "mini.npz", channels=channels)
    config = DataConfig(dataset="npz", data_root=tmp_path / "mini.npz", image_size=size)
    data = load_data(config, seed=0)
    assert data.image_shape == (3, size, size)
    given = torch.from_numpy(arrays["test_images"]).reshape(10, 12, 12, channels).permute(0, 3, 1, 2)
    assert isinstance(data.test, TensorSet)
    assert torch.equal(data.test.images, F.interpolate(given, size=size, mode="bilinear", antialias=True))


@pytest.mark.skipif(not (SHARED / "data/cifar10-jpeg").exists(), reason="CIFAR-10 in JPEG is not here")
def test_cifar10_in_files() -> None:
    root = SHARED / "data/cifar10-jpeg"
    data = load_data(DataConfig(dataset="folder", data_root=root, per_class=5, image_size=32), seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (50, 50, 10000)
    assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))
    (x, _), *_ = data.test.eval_batches(1)
    first, _ = datasets.ImageFolder(root / "test")[0]
    torch.testing.assert_close(x, normalised(transforms.PILToTensor()(first)[None]))
