"""Every data set by name: its reader, and what is known of it before it is read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torchvision import datasets

from l2t_fast.data.readers.layout import DamagedError, Labelled, Reader
from l2t_fast.data.readers.npz import npz
from l2t_fast.data.readers.photographs import cub200, image_folder, mit67, photographs, stanford40, stanford_dogs
from l2t_fast.data.readers.small import both_parts, cifar, digits, fashion, stl10
from l2t_fast.data.readers.tinyimagenet import URL, tinyimagenet
from l2t_fast.errors import L2TError, first_line
from l2t_fast.files import at_home

READERS: dict[str, Reader] = {
    "digits": Reader(digits, flip=False),
    "fashion-mnist": Reader(partial(both_parts, fashion)),
    "cifar10": Reader(partial(both_parts, partial(cifar, datasets.CIFAR10))),
    "cifar100": Reader(partial(both_parts, partial(cifar, datasets.CIFAR100)), num_classes=100),
    "stl10": Reader(partial(both_parts, stl10)),
    "tinyimagenet": Reader(tinyimagenet, num_classes=200, get=f"{{command}} gets {URL} (remove a damaged copy first)"),
    "cub200": photographs(
        cub200,
        "CUB_200_2011",
        "images",
        200,
        "http://www.vision.caltech.edu/datasets/cub_200_2011/",
        "images/CLASS/IMAGE.jpg, images.txt, classes.txt, image_class_labels.txt and train_test_split.txt, or "
        "train/CLASS/IMAGE.jpg and test/CLASS/IMAGE.jpg",
    ),
    "mit67": photographs(
        mit67,
        "mit67",
        "Images",
        67,
        "https://web.mit.edu/torralba/www/indoor.html",
        "Images/CLASS/IMAGE.jpg, TrainImages.txt and TestImages.txt",
    ),
    "stanford40": photographs(
        stanford40,
        "stanford40",
        "JPEGImages",
        40,
        "http://vision.stanford.edu/Datasets/40actions.html",
        "JPEGImages/IMAGE.jpg, ImageSplits/ACTION_train.txt and ImageSplits/ACTION_test.txt",
    ),
    "stanford-dogs": photographs(
        stanford_dogs,
        "stanford-dogs",
        "Images",
        120,
        "http://vision.stanford.edu/aditya86/ImageNetDogs/",
        "Images/CLASS/IMAGE.jpg, train_list.mat and test_list.mat (beside Images/ or in lists/), or "
        "train/CLASS/IMAGE.jpg and test/CLASS/IMAGE.jpg",
    ),
    "folder": Reader(image_folder, num_classes=0),
    "npz": Reader(npz, num_classes=0),
}


def read_dataset(name: str, root: Path, download: bool) -> tuple[Labelled, Labelled | None, int]:
    """The training set, the test set and the number of classes of READERS[name], which lies under `root`.

    None for a test set: the data set has none. Images that stay in files are looked for, not opened.

    Raises L2TError when the data set is missing or damaged: what of it, and how to get it.
    """
    reader = READERS[name]
    try:
        train, test = reader.read(at_home(root), download)
    except (DamagedError, OSError) as error:
        reason = f" ({first_line(error)})" if str(error) else ""
        how = reader.get.format(command=f"`l2t-fast train --dataset {name} --data-root {root} --download`")
        raise L2TError(f"{name} is missing or damaged in {at_home(root).resolve()}{reason}; {how}.") from error
    return train, test, reader.num_classes or int(train.labels.max()) + 1
