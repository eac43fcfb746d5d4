"""Data sets that several tests read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2t_fast.data.options import DataConfig
from l2t_fast.data.splits import Data, load_data
from tests.data.samples import rng


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(DataConfig(), seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for i, path in enumerate(f"{part}/{c}/{j}.png" for part in ("train", "val") for c in "ab" for j in range(5)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / path)
    return root
