"""Data sets as they lie on disk: read whole, or refused with what is missing."""

from __future__ import annotations

import builtins
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets, transforms

from l2t_fast.choices import DATASETS
from l2t_fast.data.images import FolderSet, TensorSet
from l2t_fast.data.loading import load
from l2t_fast.data.options import DataConfig
from l2t_fast.data.readers.catalogue import READERS
from l2t_fast.data.splits import Data, load_data
from l2t_fast.errors import L2TError
from tests.data.samples import (
    PHOTOGRAPHS,
    SHARED,
    fingerprints,
    normalised,
    rng,
    sort_by_part,
    write_cifar,
    write_photographs,
    write_tinyimagenet,
)


def test_every_data_set_has_a_reader() -> None:
    assert list(READERS) == list(DATASETS)


def test_digits(digits: Data) -> None:
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert (digits.num_classes, digits.image_shape) == (10, (3, 32, 32))
    x, y = next(digits.train.batches(16, seed=0, epoch=0))
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((16, 3, 32, 32), torch.float32, (16,), torch.int64)
    train, val, test = (torch.bincount(s.labels) for s in (digits.train, digits.val, digits.test))
    assert (test - (train + val)).abs().max() <= 1  # half of each class
    assert torch.equal(val, (0.1 * (train + val)).round().long())
    assert len(set.union(*(fingerprints(s) for s in (digits.train, digits.val, digits.test)))) == 1797  # disjoint


def test_digits_are_the_images_of_scikit_learn(digits: Data) -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    known: dict[bytes, int] = {}
    for image, label in zip(source.images, source.target, strict=True):
        large = F.interpolate(torch.tensor(image)[None, None], size=32, mode="bilinear") * (255 / 16)
        known[large.round().to(torch.uint8).numpy().tobytes()] = int(label)
    assert isinstance(digits.test, TensorSet)
    for image, label in zip(digits.test.images, digits.test.labels, strict=True):
        assert known[image.numpy().tobytes()] == label


@pytest.mark.skipif(not (SHARED / "data/FashionMNIST").exists(), reason="Fashion-MNIST is not here")
def test_fashion_mnist() -> None:
    data = load_data(DataConfig(dataset="fashion-mnist", data_root=SHARED / "data", per_class=50), seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (500, 500, 10000)
    official = datasets.FashionMNIST(SHARED / "data", train=False)
    assert torch.equal(data.test.labels, official.targets)
    x, _ = next(data.test.eval_batches(8))
    torch.testing.assert_close(x, normalised(F.pad(official.data[:8, None], [2] * 4)))


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_cifar(tmp_path, name, monkeypatch)
    data = load_data(DataConfig(dataset=name, data_root=tmp_path, val_fraction=0.5), seed=0)
    assert len(data.train) + len(data.val) == 40
    assert (data.num_classes, data.image_shape) == (classes, (3, 32, 32))
    (x, y), *_ = data.test.eval_batches(100)
    torch.testing.assert_close(x, normalised(torch.from_numpy(images)))
    assert y.tolist() == labels


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for i, part in enumerate(("train", "test")):
        images = rng(i).integers(0, 256, (20, 3, 96, 96), dtype=np.uint8)  # columns before rows, as STL-10 has them
        images.tofile(folder / f"{part}_X.bin")
        (1 + np.arange(20, dtype=np.uint8) % 10).tofile(folder / f"{part}_y.bin")
    (folder / "unlabeled_X.bin").touch()
    for files in ("train_list", "test_list"):
        monkeypatch.setattr(datasets.STL10, files, [(file, None) for file, _ in getattr(datasets.STL10, files)])
    data = load_data(DataConfig(dataset="stl10", data_root=tmp_path), seed=0)
    assert (len(data.train), len(data.val), data.num_classes) == (20, 0, 10)
    assert isinstance(data.test, TensorSet)
    resized = [transforms.Resize(32)(Image.fromarray(image.transpose(2, 1, 0))) for image in images]
    expected = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
    assert (data.test.images.int() - expected.int()).abs().max() <= 1  # rounding
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]


def shrunk(paths: list[Path]) -> Tensor:
    """uint8 [N, 3, 32, 32], as the authors."""
    shape = transforms.Compose([transforms.Resize(32), transforms.PILToTensor()])
    return torch.stack([shape(datasets.folder.default_loader(str(path))) for path in paths])


@pytest.mark.parametrize("inside", [False, True])
def test_tinyimagenet(tmp_path: Path, inside: bool) -> None:
    train, test = write_tinyimagenet(tmp_path)
    root = tmp_path / "tiny-imagenet-200" if inside else tmp_path
    data = load_data(DataConfig(dataset="tinyimagenet", data_root=root, val_fraction=0), seed=0)
    assert (data.num_classes, data.image_shape) == (200, (3, 32, 32))
    assert data.train.labels.tolist() == [c for c in range(200) for _ in range(2)]
    assert data.test.labels.tolist() == list(range(200))
    assert isinstance(data.train, TensorSet)
    assert isinstance(data.test, TensorSet)
    assert data.train.flip
    assert torch.equal(data.train.images, shrunk(train))
    assert torch.equal(data.test.images, shrunk(test))


def test_tinyimagenet_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = write_tinyimagenet(tmp_path)
    config = DataConfig(dataset="tinyimagenet", data_root=tmp_path, val_fraction=0)
    decodings = []

    def counted(images: Any, batch_size: int, workers: int) -> Iterator[Tensor]:
        decodings.append(workers)
        return load(images, batch_size, 0)

    monkeypatch.setattr("l2t_fast.data.readers.tinyimagenet.load", counted)

    def decoded_again() -> bool:
        before = len(decodings)
        data = load_data(config, seed=0)
        assert isinstance(data.train, TensorSet)
        assert isinstance(data.test, TensorSet)
        assert torch.equal(data.train.images, shrunk(train))
        assert torch.equal(data.test.images, shrunk(test))
        return len(decodings) > before

    assert decoded_again()
    assert not decoded_again()
    home = tmp_path / "tiny-imagenet-200"
    (cache,) = {path for path in home.iterdir() if path.is_file()} - {home / "wnids.txt"}
    whole = cache.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], b"", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        cache.write_bytes(damaged)
        assert decoded_again()
        assert not decoded_again()
    Image.new("RGB", (64, 64), "red").save(train[3])
    assert decoded_again()
    train.pop(5).unlink()
    assert decoded_again()
    assert not decoded_again()

    cache.unlink()
    cache.mkdir()  # it cannot be written there
    assert decoded_again()
    assert {path.name for path in home.iterdir()} == {"train", "val", "wnids.txt", cache.name}


def test_tinyimagenet_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, root: str, md5: str) -> None:
        assert (url.rpartition("/")[2], len(md5)) == ("tiny-imagenet-200.zip", 32)
        write_tinyimagenet(Path(root))

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nat all")

    config = DataConfig(dataset="tinyimagenet", data_root=tmp_path, download=True)
    monkeypatch.setattr("l2t_fast.data.readers.tinyimagenet.download_and_extract_archive", offline)
    with pytest.raises(L2TError, match=r"tinyimagenet is missing .*\(no route to host\)"):
        load_data(config, seed=0)
    monkeypatch.setattr("l2t_fast.data.readers.tinyimagenet.download_and_extract_archive", download)
    assert len(load_data(config, seed=0).test) == 200
    monkeypatch.setattr("l2t_fast.data.readers.tinyimagenet.download_and_extract_archive", offline)  # it is there
    assert len(load_data(config, seed=0).test) == 200


@pytest.mark.parametrize(("name", "num_classes"), PHOTOGRAPHS.items())
def test_photographs(name: str, num_classes: int, tmp_path: Path) -> None:
    parts = write_photographs(tmp_path, name)
    folder = {"cub200": "images", "stanford40": "JPEGImages"}.get(name, "Images")
    sort_by_part(tmp_path / "prepared", parts, tmp_path / folder, remove=False)
    data = load_data(DataConfig(dataset=name, data_root=tmp_path, val_fraction=0, workers=0), seed=0)
    assert (data.num_classes, data.image_shape) == (num_classes, (3, 224, 224))
    for part, found in (("train", data.train), ("test", data.test)):
        expected = datasets.ImageFolder(tmp_path / "prepared" / part)
        assert isinstance(found, FolderSet)
        assert [Path(path).name for path in found.paths] == [Path(path).name for path, _ in expected.samples]
        assert found.labels.tolist() == expected.targets

    shape = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    x, _ = next(data.test.eval_batches(6))  # gray ones and those with a palette among them
    torch.testing.assert_close(x, normalised(torch.stack([shape(expected[i][0]) for i in range(6)])))
    x, _ = next(data.train.batches(2, seed=0, epoch=0))
    assert x.shape == (2, 3, 224, 224)


def test_dogs_with_their_lists_in_a_folder(tmp_path: Path) -> None:
    write_photographs(tmp_path, "stanford-dogs")
    (tmp_path / "lists").mkdir()
    for part in ("train", "test"):
        (tmp_path / f"{part}_list.mat").rename(tmp_path / f"lists/{part}_list.mat")
    assert len(load_data(DataConfig(dataset="stanford-dogs", data_root=tmp_path), seed=0).test) == 120


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("cub200", "rm classes.txt", r"there is no \S+/classes.txt\)"),
        (
            "cub200",
            "rm images/001.Black_footed_Albatross/001.Black_footed_Albatross_2.jpg",
            r"_2.jpg is listed, but not",
        ),
        ("cub200", "add image_class_labels.txt 7 201", "image 7, .* has no class or no part in the lists"),
        ("cub200", "add image_class_labels.txt 7 1", "image 7, .* has no class or no part in the lists"),
        ("cub200", "add train_test_split.txt 7 2", "image 7, .* has no class or no part in the lists"),
        ("cub200", "add classes.txt 7", "classes.txt has a line of one word"),
        ("mit67", "rm TestImages.txt", r"there is no \S+/TestImages.txt\)"),
        ("mit67", "add TestImages.txt \nspace/1.jpg", "class space is in one of the lists"),
        ("mit67", "add TrainImages.txt \nbar/1.jpg", r"bar/1.jpg is listed, but not there"),
        ("mit67", "add TrainImages.txt \n\xff", "TrainImages.txt is no text"),
        ("stanford40", "rm ImageSplits", r"there is no \S+/ImageSplits/ACTION_train.txt"),
        ("stanford40", "rm ImageSplits/running_test.txt", "class running is in one of the lists"),
        ("stanford40", "rm JPEGImages/running_far_9.jpg", "running_far_9.jpg is listed, but not there"),
        ("stanford-dogs", "rm test_list.mat", r"there is no \S+/test_list.mat\)"),
        ("stanford-dogs", "cut test_list.mat", "test_list.mat is no MATLAB file with a file_list"),
        ("stanford-dogs", "rm Images/n02/n02_2.jpg", "n02_2.jpg is listed, but not there"),
        ("tinyimagenet", "rm tiny-imagenet-200/wnids.txt", r"there is no \S+/wnids.txt\)"),
        ("tinyimagenet", "rm tiny-imagenet-200/val/val_annotations.txt", r"there is no \S+/val_annotations.txt\)"),
        ("tinyimagenet", "add tiny-imagenet-200/wnids.txt n1", r"there is no \S+/train/n1/images\)"),
        ("tinyimagenet", "add tiny-imagenet-200/val/val_annotations.txt a\tn1", "class n1 is in one of the lists"),
        ("tinyimagenet", "rm tiny-imagenet-200/val/images/val_3.JPEG", "val_3.JPEG is listed, but not there"),
        ("tinyimagenet", "cut tiny-imagenet-200/val/images/val_3.JPEG", "val_3.JPEG is no readable image; replace"),
    ],
)
def test_damaged_data(name: str, damage: str, words: str, tmp_path: Path) -> None:
    if name == "tinyimagenet":
        write_tinyimagenet(tmp_path)
    else:
        write_photographs(tmp_path, name)
    verb, file, *text = damage.split(" ", 2)
    path = tmp_path / file
    if verb == "add":
        path.write_bytes(path.read_bytes() + text[0].encode("latin-1") + b"\n")
    elif verb == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(L2TError, match=words) as caught:
        load_data(DataConfig(dataset=name, data_root=tmp_path), seed=0)
    assert "\n" not in str(caught.value)


def test_a_class_is_missing_altogether(tmp_path: Path) -> None:
    config = DataConfig(dataset="stanford-dogs", data_root=tmp_path)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(L2TError, match=r"Couldn't find any class folder .*; get it from"):
        load_data(config, seed=0)
    for file in ("train/a/0.jpg", "test/a/0.jpg"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
        (tmp_path / file).parent.with_name("b").mkdir()  # empty
    with pytest.raises(L2TError, match="its lists name 1 classes instead of 120"):
        load_data(config, seed=0)


@pytest.mark.parametrize(
    ("name", "url", "images"),
    [
        ("cub200", "http://www.vision.caltech.edu/datasets/cub_200_2011/", "images/CLASS/IMAGE.jpg, images.txt"),
        ("mit67", "https://web.mit.edu/torralba/www/indoor.html", "Images/CLASS/IMAGE.jpg, TrainImages.txt"),
        ("stanford40", "http://vision.stanford.edu/Datasets/40actions.html", "JPEGImages/IMAGE.jpg, ImageSplits/"),
        ("stanford-dogs", "http://vision.stanford.edu/aditya86/ImageNetDogs/", "Images/CLASS/IMAGE.jpg, train_list"),
    ],
)
def test_missing_photographs_say_how_to_get_them(name: str, url: str, images: str, tmp_path: Path) -> None:
    for download in (False, True):
        with pytest.raises(L2TError) as caught:
            load_data(DataConfig(dataset=name, data_root=tmp_path, download=download), seed=0)
        folder = images.partition("/")[0]
        start = f"{name} is missing or damaged in {tmp_path} (there is no {tmp_path / folder}); get it from {url} "
        assert str(caught.value).startswith(start + "(--download cannot) ")
        assert images in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "stl10", "tinyimagenet"])
def test_missing_data_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    command = f"l2t-fast train --dataset {name} --data-root {tmp_path} --download"
    with pytest.raises(L2TError) as caught:
        load_data(DataConfig(dataset=name, data_root=tmp_path), seed=0)
    assert command in str(caught.value)


def test_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nat all")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(L2TError, match=r"cifar10 is missing .*\(no route to host\)"):
        load_data(DataConfig(dataset="cifar10", data_root=tmp_path, download=True), seed=0)


def test_damaged_fashion_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x09" * 3)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(L2TError, match="missing or damaged"):
        load_data(DataConfig(dataset="fashion-mnist", data_root=tmp_path), seed=0)


def test_missing_or_odd_folder(tmp_path: Path) -> None:
    config = DataConfig(dataset="folder", data_root=tmp_path)
    with pytest.raises(L2TError, match=r"is no image folder.*train/CLASS/"):
        load_data(config, seed=0)
    for path in ("train/a", "train/b", "val/a"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path / "0.png")
    with pytest.raises(L2TError, match="class b is in one of"):
        load_data(config, seed=0)


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(L2TError, match=r'pip install "l2t-fast\[digits\]"'):
        load_data(DataConfig(), seed=0)
