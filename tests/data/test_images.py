"""Batches are a pure function of seed, epoch and position; augmentation and evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision import datasets, transforms

from l2t_fast.data.images import Part
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data, load_data
from l2t_fast.errors import L2TError
from tests.data.samples import equal, normalised, tensor_set


def test_batches_are_a_pure_function_of_seed_epoch_position() -> None:
    images = tensor_set(201, augment=True)
    state = torch.get_rng_state()
    whole = list(images.batches(32, seed=3, epoch=5))
    torch.manual_seed(1)
    assert equal(whole, list(images.batches(32, seed=3, epoch=5)))
    for start in (0, 1, 7, len(whole) - 1, len(whole)):
        assert equal(whole[start:], list(images.batches(32, seed=3, epoch=5, start=start)))
    assert not equal(whole, list(images.batches(32, seed=4, epoch=5)))
    assert not equal(whole, list(images.batches(32, seed=3, epoch=6)))
    torch.set_rng_state(state)
    list(images.batches(32, seed=0, epoch=0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["tensors", "files"])
def test_parts_of_a_batch_make_the_batch(kind: str, folder: Path) -> None:
    images = tensor_set(77, augment=True)
    size, last = 16, 13
    if kind == "files":
        options = DataConfig(dataset="folder", data_root=folder, workers=0)
        images = load_data(options, 0).train  # type: ignore[assignment]
        size, last = 5, len(images) % 5
    whole = list(images.batches(size, seed=3, epoch=5, start=1))
    parts = [list(images.batches(size, seed=3, epoch=5, start=1, part=Part(r, 3, 3))) for r in range(3)]
    kept = len(whole) - (0 < last < 6)
    assert kept == images.num_batches(size, 3) - 1 == len(parts[0])
    joined = [tuple(map(torch.cat, zip(*batch, strict=True))) for batch in zip(*parts, strict=True)]
    assert equal(joined, whole[:kept])  # type: ignore[arg-type]
    assert [len(y) for _, y in parts[0]] == [-(-len(y) // 3) for _, y in whole[:kept]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_is_a_crop_in_a_zero_border(flip: bool, channels: int) -> None:
    images = tensor_set(60, augment=True, flip=flip, channels=channels)
    seen = set()
    for x, y in images.batches(16, seed=0, epoch=0):
        for image, label in zip(x, y.tolist(), strict=True):
            padded = F.pad(images.images[label], [4] * 4)
            crops = {
                (top, left, mirrored): crop.flip(-1) if mirrored else crop
                for top in range(9)
                for left in range(9)
                for crop in [padded[:, top : top + 12, left : left + 10]]
                for mirrored in ([False, True] if flip else [False])
            }
            keys = [k for k, crop in crops.items() if torch.allclose(normalised(crop[None])[0], image, atol=1e-5)]
            assert len(keys) == 1
            seen.add(keys[0])
    assert {top for top, _, _ in seen} == set(range(9))
    assert {left for _, left, _ in seen} == set(range(9))
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def test_one_epoch_shows_every_image_once() -> None:
    images = tensor_set(21, augment=False)
    shown = list(images.batches(6, seed=0, epoch=0))
    order = torch.cat([y for _, y in shown])
    assert sorted(order.tolist()) == list(range(21)) != order.tolist()
    torch.testing.assert_close(torch.cat([x for x, _ in shown]), normalised(images.images[order]))


def test_evaluation_is_in_order() -> None:
    images = tensor_set(21, augment=True)
    shown = list(images.eval_batches(5))
    assert [len(y) for _, y in shown] == [5, 5, 5, 5, 1]
    assert torch.equal(torch.cat([y for _, y in shown]), images.labels)
    torch.testing.assert_close(torch.cat([x for x, _ in shown]), normalised(images.images))
    assert list(tensor_set(0, augment=False).eval_batches(5)) == []


@pytest.mark.parametrize(("n", "sizes"), [(12, [4, 4, 4]), (13, [4, 4, 4]), (14, [4, 4, 4, 2]), (1, []), (0, [])])
def test_a_trailing_batch_of_one_is_dropped(n: int, sizes: list[int]) -> None:
    images = tensor_set(n, augment=True)
    assert [len(y) for _, y in images.batches(4, seed=0, epoch=0)] == sizes
    assert images.num_batches(4) == len(sizes)


def test_only_training_images_are_augmented(digits: Data) -> None:
    assert (digits.train.augment, digits.val.augment, digits.test.augment) == (True, False, False)


def test_moved_to_a_device(digits: Data) -> None:
    moved = digits.train.to("meta")
    x, y = next(moved.batches(8, seed=0, epoch=0))
    assert (x.device.type, y.device.type, moved.labels.device.type) == ("meta", "meta", "meta")
    assert digits.train.labels.device.type == "cpu"


def test_folder(folder: Path) -> None:
    config = DataConfig(dataset="folder", data_root=folder, val_fraction=0.2, workers=0)
    data = load_data(config, seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 10)
    assert (data.num_classes, data.image_shape) == (2, (3, 224, 224))
    (x, y), *_ = data.test.eval_batches(10)
    shape = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    expected = torch.stack([shape(image) for image, _ in datasets.ImageFolder(folder / "val")])
    torch.testing.assert_close(x, normalised(expected))
    assert torch.equal(y, data.test.labels)

    state = torch.get_rng_state()
    whole = list(data.train.batches(3, seed=0, epoch=1))
    assert [tuple(x.shape) for x, _ in whole] == [(3, 3, 224, 224)] * 2 + [(2, 3, 224, 224)]
    assert equal(whole[1:], list(data.train.batches(3, seed=0, epoch=1, start=1)))
    assert not equal(whole, list(data.train.batches(3, seed=0, epoch=2)))
    assert torch.equal(torch.get_rng_state(), state)

    with_workers = load_data(dataclasses.replace(config, workers=2), seed=0)
    assert equal(whole, list(with_workers.train.batches(3, seed=0, epoch=1)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_in_a_folder(folder: Path, tmp_path: Path, workers: int) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a/0.png").write_bytes((folder / "val/a/0.png").read_bytes()[:100])
    data = load_data(DataConfig(dataset="folder", data_root=tmp_path, workers=workers), seed=0)
    with pytest.raises(L2TError) as caught:
        list(data.test.eval_batches(1))
    assert str(caught.value) == f"{tmp_path / 'test/a/0.png'} is no readable image; replace or remove it."


def test_bad_seed_and_batch_size(digits: Data) -> None:
    with pytest.raises(L2TError, match="at least 0, not -1"):
        load_data(DataConfig(per_class=2), seed=-1)
    with pytest.raises(L2TError, match="batch size"):
        next(digits.train.batches(0, seed=0, epoch=0))
