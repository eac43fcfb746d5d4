"""An ImageFolder of small images as one npz file in MedMNIST's convention, for `l2t-fast ... --dataset npz`.

`python -m benchmarks.folder_to_npz FOLDER FILE.npz --val 250`: of each class under FOLDER/train the last 250 images by
name are for validation and the others for training, those under FOLDER/test for testing; `--train 0 500` keeps the
first 500 of those for training. All are of one size. The file is the same, byte by byte, wherever it is made from the
same images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from l2t_fast.data.readers.layout import open_image


def convert(
    folder: Path, file: Path, val: int, train: tuple[int, int | None] = (0, None)
) -> dict[str, tuple[int, ...]]:
    """Writes the file; returns the shape of each of its arrays."""
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(classes):
        images, held_out = (sorted(path for path in (folder / part / name).iterdir()) for part in ("train", "test"))
        cut = len(images) - val
        for part, paths in (("train", images[:cut][slice(*train)]), ("val", images[cut:]), ("test", held_out)):
            parts[part] += [(path, label) for path in paths]
    arrays: dict[str, np.ndarray] = {}
    for part, listed in parts.items():
        arrays[f"{part}_images"] = np.stack([np.asarray(open_image(str(path))) for path, _ in listed])  # [N, H, W, 3]
        arrays[f"{part}_labels"] = np.array([label for _, label in listed], dtype=np.uint8)
    np.savez(file, **arrays)
    return {name: array.shape for name, array in arrays.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an ImageFolder with train/ and test/")
    parser.add_argument("file", type=Path, help="the npz file to write")
    parser.add_argument("--val", type=int, required=True, help="images of each class for validation")
    which = "which of the others are for training (default: all)"
    parser.add_argument("--train", type=int, nargs=2, metavar=("FROM", "TO"), default=(0, None), help=which)
    given = parser.parse_args(arguments)
    for name, shape in convert(given.folder, given.file, given.val, given.train).items():
        print(f"{name}: {' x '.join(map(str, shape))}")


if __name__ == "__main__":
    main()
