"""What is for training, validation and testing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import datasets

from l2t_fast.data.images import FolderSet, TensorSet
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data, load_data
from l2t_fast.errors import L2TError
from tests.data.samples import (
    PHOTOGRAPHS,
    SHARED,
    fingerprints,
    normalised,
    save_split,
    sort_by_part,
    write_cifar,
    write_photographs,
)


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


@pytest.mark.parametrize("name", ["cub200", "stanford-dogs"])
def test_split_files_fit_both_layouts(name: str, tmp_path: Path) -> None:
    original, prepared = tmp_path / "a/CUB_200_2011", tmp_path / "b/CUB_200_2011"
    for root in (original, prepared):
        root.mkdir(parents=True)
        parts = write_photographs(root, name)
    folder = {"cub200": "images"}.get(name, "Images")
    sort_by_part(prepared, parts, prepared / folder, remove=True)
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
    monkeypatch.setattr("l2t_fast.data.splits.whole_sets", lambda *_: (train, test, num_classes, None))
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
        (
            save_split(tmp_path / "f", (everything, [0.5, 1.9]), good, good),
            "f-train is no torch-saved",
        ),  # no cut numbers
        (save_split(tmp_path / "g", ([0.9, 1.2], [0]), good, good), "g-train is no torch-saved"),
        (save_split(tmp_path / "h", good, (everything, [[0, 1], [2, 3]]), good), "h-val is no torch-saved"),
        (save_split(tmp_path / "i", good, (everything, [True, False]), good), "i-val is no torch-saved"),
        (save_split(tmp_path / "j", ([0, 10**18], [0]), good, good), "j-train is no torch-saved"),
        (save_split(tmp_path / "k", (everything, [0, 1, 0]), good, good), "k-train names an image twice"),
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
        (DataConfig(data_root=3), "data_root must be a path, not 3"),  # type: ignore[arg-type]
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


@pytest.mark.parametrize("seed", [1.5, None, "a"])
def test_seeds_that_are_none(seed: Any) -> None:
    with pytest.raises(L2TError, match="the seed must be a whole number, not"):
        load_data(DataConfig(per_class=3), seed)
