"""What a training with meta-parameters has learned, λ and w of each pair, as metrics.jsonl and learned.json tell it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2t_fast.choices import METHODS
from l2t_fast.errors import L2TError
from l2t_fast.files import load_json
from l2t_fast.reports.arrays import Array, ragged
from l2t_fast.training.log import read_epochs

TOP = 0.1  # the share of the channels whose weight is told


@dataclass(frozen=True)
class Learned:
    """What one method learned in one column, by seed and pair; nan where a seed has not got so far.

    `layers` holds (source, m, n) of each pair, the source "" if there is one alone; older runs have it at the end only.
    `final` (λ at the end) and `history` (its mean in each epoch) are None where λ is fixed, `effective` (the share of
    effective channels), `top` (the weight of a tenth of them) and `profiles` where w is uniform or not yet known.
    """

    column: str
    method: str
    seeds: list[int]
    names: list[str]
    layers: list[tuple[str, str, str]] | None
    final: Array | None  # [seeds, P]
    history: Array | None  # [seeds, epochs, P]
    effective: Array | None  # [seeds, P]
    top: Array | None  # [seeds, P]
    profiles: list[Array] | None  # of each pair [seeds, C_s]: C_s * w in falling order
    under_way: dict[int, int]  # of a seed that has not ended: its epochs so far


def top_weight(profile: Sequence[float], share: float = TOP) -> float:
    """The part of the weight on the first `share` of the channels, linear within a channel, so that uniform is `share`.

    profile: C_s * w in falling order.
    """
    cumulated = np.concatenate([[0.0], np.cumsum(profile)]) / len(profile)
    return float(np.interp(share * len(profile), np.arange(len(profile) + 1), cumulated))


def read_learned(folder: Path) -> list[Learned]:
    """What every method with meta-parameters in `folder` learned, column by column.

    Raises:
        L2TError: as `inspect` does.
    """
    cells = [*folder.glob("*/seed-*"), *folder.glob("*/*/seed-*")]
    cells = [cell for cell in cells if cell.name.removeprefix("seed-").isdecimal()]
    if not cells:
        raise L2TError(f"{folder} is no run: give a folder that `l2t-fast train` or `l2t-fast table` made.")
    groups: dict[tuple[str, str], list[Path]] = {}
    for cell in cells:
        column = cell.parent.parent.relative_to(folder).as_posix()
        groups.setdefault(("" if column == "." else column, cell.parent.name), []).append(cell)
    known = list(METHODS)
    order = sorted(groups, key=lambda key: (key[0], known.index(key[1]) if key[1] in known else len(known), key[1]))
    found = [_read(column, method, groups[column, method]) for column, method in order]
    learned = [one for one in found if one is not None]
    if not learned:
        methods = ", ".join(dict.fromkeys(method for _, method in order))
        raise L2TError(
            f"nothing in {folder} has learned what or where to transfer yet ({methods}): inspect a run of l2t-ww."
        )
    return learned


@dataclass(frozen=True)
class _Training:
    """One seed: its epochs that have λ, if the method has meta-parameters, and learned.json, if it was written yet."""

    epochs: list[dict[str, Any]]
    learned: Mapping[str, Any] | None
    pairs: Mapping[str, Any] | None  # what learned.json has of them, from the start
    ended: bool


def _read(column: str, method: str, cells: Sequence[Path]) -> Learned | None:
    """None if the method has no meta-parameters, or no training of it has ended an epoch."""
    read = {int(cell.name.removeprefix("seed-")): _read_training(cell) for cell in cells}
    trainings = {seed: read[seed] for seed in sorted(read) if read[seed].epochs}
    if not trainings:
        return None
    contents = [training.learned for training in trainings.values()]
    told = next((content for content in contents if content is not None), None)
    each_named = [training.pairs for training in trainings.values() if training.pairs is not None]
    named = each_named[0] if each_named else None
    if any(other["pairs"] != each_named[0]["pairs"] for other in each_named):
        raise L2TError(
            f"the seeds of {cells[0].parent} have other pairs than each other: inspect a run of one setting."
        )
    weights = [[row["pair_weights"] for row in t.epochs] for t in trainings.values()]  # [seeds][epochs][P]
    pairs = len(weights[0][0])
    # λ = 1 to the last bit is no learned one; learned.json says it outright.
    fixed = "pair_weights" not in told if told is not None else all(w == [1.0] * pairs for ws in weights for w in ws)
    final = history = None
    if not fixed:
        ends = [(c or {}).get("pair_weights") or ws[-1] for c, ws in zip(contents, weights, strict=True)]
        final = np.array(ends, dtype=np.float64)
        history = np.stack([ragged([[w[p] for w in ws] for ws in weights]) for p in range(pairs)], axis=2)
    effective = top = profiles = None
    if told is not None and "channels" in told:
        known = [content["channels"] for content in contents if content is not None]
        unknown: list[dict[str, Any]] = [{"effective": np.nan, "profile": [np.nan]}] * pairs
        each = [content["channels"] if content is not None else unknown for content in contents]
        effective = np.array([[channels["effective"] for channels in seed] for seed in each])
        top = np.array([[top_weight(channels["profile"]) for channels in seed] for seed in each])
        profiles = [np.array([seed[p]["profile"] for seed in known]) for p in range(pairs)]
    return Learned(
        column=column,
        method=method,
        seeds=list(trainings),
        names=named["pairs"] if named is not None else [f"pair {p + 1}" for p in range(pairs)],
        layers=_layers(named) if named is not None else None,
        final=final,
        history=history,
        effective=effective,
        top=top,
        profiles=profiles,
        under_way={seed: len(training.epochs) for seed, training in trainings.items() if not training.ended},
    )


def _layers(learned: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(source, m, n) of each pair; its name has "SOURCE:" before it where there are several sources."""
    named = zip(learned["pairs"], learned["source"], learned["target"], strict=True)
    return [(name.removesuffix(f"{m} → {n}").removesuffix(":"), m, n) for name, m, n in named]


def _read_training(cell: Path) -> _Training:
    metrics, content, pairs = (cell / name for name in ("metrics.jsonl", "learned.json", "pairs.json"))
    epochs = read_epochs(metrics) if metrics.exists() else []
    learned = load_json(content) if content.exists() else None
    named = learned if learned is not None or not pairs.exists() else load_json(pairs)
    epochs = [row for row in epochs if "pair_weights" in row and "meta_loss" in row]
    if named is not None and not _is_whole(named, epochs):
        raise L2TError(f"{content if learned is not None else pairs} is not what a training writes: train it anew.")
    return _Training(epochs, learned, named, (cell / "result.json").exists())


def _is_whole(content: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether learned.json, or pairs.json, says of each pair of these epochs what `runs.cell` writes."""

    def are(values: Any, kind: Any, count: int | None = None) -> bool:
        return (
            isinstance(values, list)
            and all(isinstance(value, kind) and value == value for value in values)
            and len(values) == (count or len(values))
        )

    if not are(content.get("pairs"), str):
        return False
    count = len(content["pairs"])
    channels = content.get("channels", [{}] * count)
    return (
        all(are(content.get(key), str, count) for key in ("source", "target"))
        and are(content.get("pair_weights", [0.0] * count), int | float, count)
        and are(channels, dict, count)
        and all(
            isinstance(pair.get("effective", 0), int | float) and are(pair.get("profile", []), int | float)
            for pair in channels
        )
        and ("channels" not in content or all(pair.get("profile") and "effective" in pair for pair in channels))
        and all(len(row["pair_weights"]) == count for row in epochs)
    )
