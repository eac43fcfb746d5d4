"""Made-up results: cells and columns of tables, trainings with what they learned, and a look at pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import image

from l2t_fast.reports.column import Cell, Column
from l2t_fast.training.learned import peakedness

METHODS = ["scratch", "fm-single", "l2t-ww"]
PAIRS = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
PEAKED = peakedness(torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
UNIFORM = peakedness(torch.full((3, 4), 0.25))


def cell(method: str, seed: int, best: float | None, last: float, seconds: float = 10.0) -> Cell:
    """A finished training; accuracies in %."""
    result: dict[str, Any] = {"test_accuracy_last": last / 100, "seconds": seconds, "iterations": 60}
    if best is not None:
        result |= {"test_accuracy_best": best / 100, "val_accuracy_best": 0.5, "best_epoch": 3}
    return Cell(method, seed, result)


def cells(method: str, best: Sequence[float]) -> list[Cell]:
    return [cell(method, seed, value, value - 1, 10.0 + seed) for seed, value in enumerate(best)]


def column(title: str = "cifar100", **more: Any) -> Column:
    found = [*cells("scratch", [60, 62, 61]), *cells("fm-single", [63, 66, 63]), *cells("l2t-ww", [66, 67, 68.5])]
    return Column(title, found, **more)


def training(
    cell: Path,
    history: Sequence[Sequence[float]],
    *,
    final: Sequence[float] | None = None,
    channels: Sequence[dict[str, Any]] | None = None,
    ended: bool = True,
    meta: bool = True,
    prefix: Sequence[str] = ("", "", "", ""),
) -> None:
    """A training with λ `history` [epochs, P], and what it learned; `final` None is a fixed λ."""
    cell.mkdir(parents=True)
    more = {"meta_loss": 1.0} if meta else {}
    rows = [{"epoch": e, "pair_weights": weights, "loss": 1.0, **more} for e, weights in enumerate(history)]
    iterations = [{**row, "iteration": 0, "pair_weights": [9.0] * len(history[0])} for row in rows]
    lines = [json.dumps(row) + "\n" for both in zip(iterations, rows, strict=True) for row in both]
    (cell / "metrics.jsonl").write_text("".join(lines))
    if not ended:
        return
    (cell / "result.json").write_text("{}")
    if meta:
        pairs = PAIRS[: len(history[0])]
        learned: dict[str, Any] = {
            "pairs": [f"{source}{m} → {n}" for source, (m, n) in zip(prefix, pairs, strict=False)]
        }
        learned |= {"source": [m for m, _ in pairs], "target": [n for _, n in pairs]}
        learned |= {"pair_weights": final} if final is not None else {}
        learned |= {"channels": channels} if channels is not None else {}
        (cell / "learned.json").write_text(json.dumps(learned))


def drawn(path: Path, width: int = 200) -> None:
    """A picture at least so wide that has something on it."""
    pixels = image.imread(path)
    assert pixels.shape[0] > 100
    assert pixels.shape[1] > width
    assert np.mean(pixels[..., :3].min(-1) < 0.9) > 0.01
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
