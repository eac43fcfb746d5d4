"""Data sets, splits, and batches that are a pure function of seed, epoch and position."""

from __future__ import annotations

import builtins
import dataclasses
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets, transforms

from l2t_fast.data.images import MEAN, STD, Data, FolderSet, ImageSet, TensorSet, load_data
from l2t_fast.data.options import DataConfig
from l2t_fast.errors import L2TError

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


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(DataConfig(), seed=0)


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


def test_split_does_not_depend_on_the_seed(digits: Data) -> None:
    other = load_data(DataConfig(per_class=7), seed=1)
    assert fingerprints(other.val) < fingerprints(digits.val)
    assert fingerprints(other.test) == fingerprints(digits.test)
    assert fingerprints(other.train) < fingerprints(digits.train)
    assert torch.bincount(other.val.labels).tolist() == [7] * 10


def test_per_class() -> None:
    few, same, other, more = (
        fingerprints(load_data(DataConfig(per_class=k), seed).train) for k, seed in ((5, 0), (5, 0), (5, 1), (9, 0))
    )
    assert torch.bincount(load_data(DataConfig(per_class=5), 0).train.labels).tolist() == [5] * 10
    assert few == same
    assert few != other
    assert few < more


def test_classes_are_relabelled(digits: Data) -> None:
    data = load_data(DataConfig(classes=(7, 2)), seed=0)
    assert data.num_classes == 2
    for part, whole in ((data.train, digits.train), (data.val, digits.val), (data.test, digits.test)):
        assert isinstance(part, TensorSet)
        assert isinstance(whole, TensorSet)
        for label, old in enumerate((7, 2)):
            assert torch.equal(part.images[part.labels == label], whole.images[whole.labels == old])
        assert set(part.labels.tolist()) == {0, 1}


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


@pytest.mark.skipif(not (SHARED / "data/FashionMNIST").exists(), reason="Fashion-MNIST is not here")
def test_fashion_mnist() -> None:
    data = load_data(DataConfig(dataset="fashion-mnist", data_root=SHARED / "data", per_class=50), seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (500, 500, 10000)
    official = datasets.FashionMNIST(SHARED / "data", train=False)
    assert torch.equal(data.test.labels, official.targets)
    x, _ = next(data.test.eval_batches(8))
    torch.testing.assert_close(x, normalised(F.pad(official.data[:8, None], [2] * 4)))


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

    class Counted(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            decodings.append(workers)
            super().__init__(1)

    monkeypatch.setattr("l2t_fast.data.readers.ProcessPoolExecutor", Counted)

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
    monkeypatch.setattr("l2t_fast.data.readers.download_and_extract_archive", offline)
    with pytest.raises(L2TError, match=r"tinyimagenet is missing .*\(no route to host\)"):
        load_data(config, seed=0)
    monkeypatch.setattr("l2t_fast.data.readers.download_and_extract_archive", download)
    assert len(load_data(config, seed=0).test) == 200
    monkeypatch.setattr("l2t_fast.data.readers.download_and_extract_archive", offline)  # it is there
    assert len(load_data(config, seed=0).test) == 200


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


def prepare(root: Path, parts: dict[str, list[str]], images: Path, remove: bool) -> None:
    """What the authors' scripts do: copies to train/CLASS and test/CLASS."""
    for part, files in parts.items():
        for file in files:
            path = root / part / file
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / (file if (images / file).exists() else Path(file).name), path)
    if remove:
        shutil.rmtree(images)


@pytest.mark.parametrize(("name", "num_classes"), PHOTOGRAPHS.items())
def test_photographs(name: str, num_classes: int, tmp_path: Path) -> None:
    parts = write_photographs(tmp_path, name)
    folder = {"cub200": "images", "stanford40": "JPEGImages"}.get(name, "Images")
    prepare(tmp_path / "prepared", parts, tmp_path / folder, remove=False)
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


@pytest.mark.parametrize("name", ["cub200", "stanford-dogs"])
def test_split_files_fit_both_layouts(name: str, tmp_path: Path) -> None:
    original, prepared = tmp_path / "a/CUB_200_2011", tmp_path / "b/CUB_200_2011"
    for root in (original, prepared):
        root.mkdir(parents=True)
        parts = write_photographs(root, name)
    folder = {"cub200": "images"}.get(name, "Images")
    prepare(prepared, parts, prepared / folder, remove=True)
    every = range(PHOTOGRAPHS[name])
    indices = ([2 * c for c in every], [2 * c + 1 for c in every][::-1], [5, 3])
    split = save_split(tmp_path / name, *((list(every), part) for part in indices))
    samples = {part: datasets.ImageFolder(prepared / part).samples for part in ("train", "test")}
    expected = [
        [samples[part][i] for i in chosen] for part, chosen in zip(("train", "train", "test"), indices, strict=True)
    ]
    roots = [original, prepared, *((original.parent, prepared.parent) if name == "cub200" else ())]
    for root in roots:
        data = load_data(DataConfig(dataset=name, data_root=root, split=split), seed=0)
        for found, wanted in zip((data.train, data.val, data.test), expected, strict=True):
            assert isinstance(found, FolderSet)
            assert [Path(path).name for path in found.paths] == [Path(path).name for path, _ in wanted]
            assert found.labels.tolist() == [label for _, label in wanted]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for i, path in enumerate(f"{part}/{c}/{j}.png" for part in ("train", "val") for c in "ab" for j in range(5)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / path)
    return root


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


def save_split(prefix: Path, train: Any, val: Any, test: Any) -> str:
    for part, content in (("train", train), ("val", val), ("test", test)):
        torch.save(content, f"{prefix}-{part}")
    return str(prefix)


def test_split_files_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_cifar(tmp_path, "cifar10", monkeypatch)
    classes = [7, 0]  # the labels of images 1 and 0 of every file of 8
    split = save_split(tmp_path / "my", (classes, [9, 0, 1]), (classes, [8]), (classes, [11, 0, 1]))
    config = DataConfig(dataset="cifar10", data_root=tmp_path, split=split)
    data = load_data(config, seed=0)
    assert data.num_classes == 2
    assert [part.labels.tolist() for part in (data.train, data.val, data.test)] == [[0, 1, 0], [1], [0, 1, 0]]
    (x, _), *_ = data.test.eval_batches(3)
    torch.testing.assert_close(x, normalised(torch.from_numpy(images[[11, 0, 1]])))
    assert [labels[i] for i in (11, 0, 1)] == [7, 0, 7]
    few = load_data(dataclasses.replace(config, per_class=1), seed=0)
    assert (sorted(few.train.labels.tolist()), len(few.val)) == ([0, 1], 1)


@pytest.mark.skipif(not (SHARED / "official/split").exists(), reason="the authors' split files are not here")
@pytest.mark.parametrize(
    ("name", "sizes", "totals", "num_classes"),
    [
        ("cifar100", (45000, 5000, 10000), (50000, 10000), 100),
        ("stl10", (4500, 500, 8000), (5000, 8000), 10),
        ("cub200", (4994, 1000, 5794), (5994, 5794), 200),
        ("dog", (10800, 1200, 8580), (12000, 8580), 120),
    ],
)
def test_authors_splits(
    name: str,
    sizes: tuple[int, ...],
    totals: tuple[int, int],
    num_classes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def numbered(n: int) -> TensorSet:
        """n images that hold their own index, with labels that run through the classes."""
        index = torch.arange(n)
        pixels = torch.stack([index // 256, index % 256, index * 0], 1).to(torch.uint8)[:, :, None, None]
        return TensorSet(labels=index % num_classes, augment=True, images=pixels, flip=False)

    train, test = map(numbered, totals)
    monkeypatch.setattr("l2t_fast.data.images._read", lambda *_: (train, test, num_classes))
    data = load_data(DataConfig(split=str(SHARED / "official/split" / name)), seed=0)
    parts = (data.train, data.val, data.test)
    assert data.num_classes == num_classes
    assert tuple(len(part) for part in parts) == sizes
    for part in parts:
        assert isinstance(part, TensorSet)
        index = part.images[:, 0].flatten().long() * 256 + part.images[:, 1].flatten().long()
        assert torch.equal(part.labels, index % num_classes)
        assert len(index.unique()) == len(index)
    assert not fingerprints(data.train) & fingerprints(data.val)


def test_bad_split_files(tmp_path: Path) -> None:
    everything = list(range(10))
    good = (everything, [0, 1])
    bad = [
        (save_split(tmp_path / "a", good, "text", good), "a-val is no torch-saved"),
        (save_split(tmp_path / "b", good, good, (everything, [5000])), "b-test names images that are not among"),
        (save_split(tmp_path / "c", good, good, ([0, 1], [0])), "c-test names other classes"),
        (save_split(tmp_path / "d", ([3], list(range(50))), good, good), "d-train names images of classes"),
        (save_split(tmp_path / "e", ([0, 0], [0]), good, good), "e-train is no torch-saved"),
        (str(tmp_path / "absent"), "no split file .*absent-train"),
    ]
    for split, words in bad:
        with pytest.raises(L2TError, match=words):
            load_data(DataConfig(split=split), seed=0)
    (tmp_path / "b-train").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(L2TError, match="b-train is no torch-saved"):
        load_data(DataConfig(split=str(tmp_path / "b")), seed=0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DataConfig(dataset="cifar11"), "nearest names are cifar10"),
        (DataConfig(classes=(3, 10)), "classes 0 to 9"),
        (DataConfig(classes=(-1, 3)), "classes 0 to 9"),
        (DataConfig(classes=(3, 3)), "must be different"),
        (DataConfig(classes=()), "at least one"),
        (DataConfig(classes=(3,), split="x"), "either classes or a split"),
        (DataConfig(per_class=500), r"class 0 .* has 80 training images .* ask for at most 80"),
        (DataConfig(per_class=0), "per_class must be at least 1"),
        (DataConfig(val_fraction=1.0), "val_fraction"),
        (DataConfig(workers=-1), "workers"),
    ],
)
def test_load_data_refuses(config: DataConfig, words: str) -> None:
    with pytest.raises(L2TError, match=words):
        load_data(config, seed=0)


def test_bad_seed_and_batch_size(digits: Data) -> None:
    with pytest.raises(L2TError, match="at least 0, not -1"):
        load_data(DataConfig(per_class=2), seed=-1)
    with pytest.raises(L2TError, match="batch size"):
        next(digits.train.batches(0, seed=0, epoch=0))


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
