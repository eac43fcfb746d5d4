"""A column of a table, as its trainings left it: their results and epochs, and what the paper has beside them."""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2t_fast.choices import METHODS
from l2t_fast.errors import L2TError
from l2t_fast.files import load_json
from l2t_fast.reports.published import Numbers, Published, published
from l2t_fast.settings.options import TrainConfig
from l2t_fast.settings.stored import load_config
from l2t_fast.training.log import read_epochs

Epochs = Sequence[Mapping[str, Any]]  # the epoch lines of one metrics.jsonl
Problems = dict[str, dict[str, str]]  # method: {seed: why there is no result}
NOT_YET = "not trained yet"
_RESULT = ("test_accuracy_last", "seconds")  # numbers that every result.json has
_COUNTS = ("best_epoch", "iterations", "images")


@dataclass(frozen=True)
class Cell:
    """One training. `result` is the content of its result.json; `problem`: why there is none, or what failed then."""

    method: str
    seed: int
    result: Mapping[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Column:
    """One target: its cells, what the paper has for it and where, the epoch lines of its methods.

    Columns of one `group` (not "") differ in `per_class` alone, training images a class, None for all of them.
    """

    title: str
    cells: Sequence[Cell]
    published: Numbers = field(default_factory=dict)
    published_in: str = Published({}).place
    curves: Mapping[str, Sequence[Epochs]] = field(default_factory=dict)
    per_class: int | None = None
    group: str = ""
    folder: Path = Path()


def read_problems(folder: Path) -> Problems:
    """What problems.json of a column says; nothing where there is none yet.

    Raises:
        L2TError: the file is damaged.
    """
    path = folder / "problems.json"
    found: Problems = load_json(path) if path.exists() else {}
    whys = [why for seeds in found.values() for why in (seeds.values() if isinstance(seeds, dict) else [None])]
    if not all(isinstance(why, str) for why in whys):
        raise L2TError(f"{path} is damaged: remove it, and give the command again.")
    return found


def read_result(path: Path) -> dict[str, Any]:
    """The content of a result.json.

    Raises:
        L2TError: it is damaged.
    """
    result = load_json(path, _RESULT)
    for key, value in result.items():
        if key == "made":
            fits = isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
        elif key in _COUNTS:
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        else:
            most = 1.0 if "accuracy" in key else sys.float_info.max
            number = key in _RESULT or "accuracy" in key
            fits = not number or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most)
        if not fits:
            raise L2TError(
                f"{path} is damaged ('{key}' cannot be {value!r:.40}): remove it, and give the command again."
            )
    return result


def read_column(folder: Path, config: TrainConfig, problems: Problems) -> Column:
    """The column of a table that a run, in `folder`, is."""
    cells: list[Cell] = []
    curves: dict[str, list[Epochs]] = {}
    for method in config.method or ():
        for seed in config.seeds or ():
            path = folder / method / f"seed-{seed}" / "result.json"
            result = read_result(path) if path.exists() else None
            why = problems.get(method, {}).get(str(seed), "" if result else NOT_YET)
            cells.append(Cell(method, seed, result, why))
            if result:
                curves.setdefault(method, []).append(read_epochs(path.with_name("metrics.jsonl")))
    limit, paper = config.data.per_class, published(config)
    group = f"{config.data.dataset}, {config.target.target}"
    return Column(
        title=group if limit is None else f"{group}, {limit} per class",
        cells=cells,
        published=paper.numbers,
        published_in=paper.place,
        curves=curves,
        per_class=limit,
        group=group,
        folder=folder,
    )


def read_table(folder: Path) -> tuple[str, list[Column], tuple[str, ...]]:
    """(title, columns in the order in which they were begun, methods) of what a table in `folder` has so far."""
    paths = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_ctime)
    configs = {path.parent: load_config(path) for path in paths}
    columns = [read_column(column, config, read_problems(column)) for column, config in configs.items()]
    title = columns[0].title if len(columns) == 1 else f"{folder.name}: accuracy on the test set (%)"
    return title, columns, in_order({method for config in configs.values() for method in config.method or ()})


def in_order(methods: Collection[str]) -> tuple[str, ...]:
    """As the rows of a table stand."""
    return tuple(name for name in METHODS if name in methods)
