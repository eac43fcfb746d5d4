"""A folder of images as an npz file that the library reads."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.folder_to_npz import main
from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import load_data


def test_a_folder_becomes_an_npz_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last images of each class are for validation; the same images give the same file."""
    for part, count in (("train", 5), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((8, 8, 3), 100 * label + 10 * i + (part == "test"), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    for name in ("one.npz", "two.npz"):
        main([str(tmp_path), str(tmp_path / name), "--val", "2"])
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert "train_images: 6 x 8 x 8 x 3" in capsys.readouterr().out
    data = load_data(DataConfig("npz", data_root=tmp_path / "one.npz"), 0)
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 4, 4]
    with np.load(tmp_path / "one.npz") as arrays:
        assert arrays["val_images"][:, 0, 0, 0].tolist() == [30, 40, 130, 140]
        assert arrays["test_labels"].tolist() == [0, 0, 1, 1]


def test_a_part_of_the_images_for_training(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / part / "cat" / f"{i}.png")
    main([str(tmp_path), str(tmp_path / "part.npz"), "--val", "2", "--train", "1", "3"])
    with np.load(tmp_path / "part.npz") as arrays:
        kept = [arrays[f"{part}_images"][:, 0, 0, 0].tolist() for part in ("train", "val", "test")]
    assert kept == [[1, 2], [4, 5], [0, 1, 2, 3, 4, 5]]
