"""Tables of trainings as one file of rows, a row a cell, and what they say: Markdown and a picture beside it.

`python -m benchmarks cells FILE.jsonl FOLDER ... --told commit=8a34420 device=H100` puts the trainings that are done in
folders of `l2t-fast table` into FILE.jsonl, beside those that it has; what the folders cannot know, where and by which
commit they were trained, is told. FILE.md has means and spreads, and of each method the difference to --against, paired
by seed; FILE.png, where there are several of them, accuracy against training images a class. Without a folder both are
made anew.
"""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, read, say
from l2t_fast.choices import METHODS
from l2t_fast.errors import L2TError
from l2t_fast.files import load_json, save_text
from l2t_fast.reports.column import Cell, Column, read_column
from l2t_fast.reports.comparison import DASH, Comparison, Standing, Summary, compare, mean_std, summarize, sweep_groups
from l2t_fast.reports.grid import Grid, to_markdown
from l2t_fast.reports.pictures.sweep import plot_sweep
from l2t_fast.runs.build import method_config
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import load_config, load_table

FIRST: Row = {"kind": "run", "config": {"benchmark": "cells"}}
SIGNIFICANT = 0.05
_KEY = ("table", "column", "method", "seed")
_HOW = ("epochs", "batch_size", "lr", "precision")  # alike for all methods of a group, as a rule
_OF_THE_MACHINE = ("runs", "device", "jobs", "launcher", "gpus_per_cell", "replicas", "submitit")
_FOUND = ("test_accuracy_last", "test_accuracy_best", "val_accuracy_best", "best_epoch", "seconds", "iterations")
BEST, LAST = "test_accuracy_best", "test_accuracy_last"
_OWN = ("beta", "meta_lr", "where")  # of methods that match features


# Rows


def cell_rows(folder: Path, told: Row) -> Iterator[Row]:
    """A row for each training that is done in the folder of a table; `told` is added to all of them."""
    table = load_table(folder / "table.json")
    for path in sorted(folder.glob("*/config.json")):
        config = load_config(path)
        inputs = path.with_name("inputs.json")
        images = config.data.data_root.stem if config.data.dataset in ("npz", "folder") else config.data.dataset
        of_column = {
            "images": images,
            "sources": list(config.source.source or ()),
            "target": config.target.target,
            "target_width": config.target.target_width,
            "per_class": config.data.per_class,
        }
        # Several commands may have filled the table: one that does it all.
        whole = dataclasses.replace(table, method=config.method or (), seeds=config.seeds or ())
        of_all = {"inputs": load_json(inputs) if inputs.exists() else {}, "command": command(whole), **told}
        for cell in read_column(path.parent, config, {}).cells:
            if cell.result is not None:
                place = zip(_KEY, (folder.name, path.parent.name, cell.method, cell.seed), strict=True)
                yield {
                    "kind": "cell",
                    **dict(place),
                    **of_column,
                    **{name: cell.result[name] for name in _FOUND if name in cell.result},
                    "settings": _settings(config, cell.method),
                    **of_all,
                }


def _settings(config: TrainConfig, method: str) -> Row:
    """How a method was trained, with what was asked for it alone."""
    optim = dataclasses.asdict(method_config(config, method).optim)
    return {name: optim[name] for name in (*_HOW, *_OWN)} | {"asked": list(config.settings)}


def command(table: TableConfig) -> str:
    """The command that makes such a table, without what belongs to the machine."""
    return shlex.join(["l2t-fast", "table", *_flags(table, TableConfig())])


def _flags(config: Any, default: Any) -> Iterator[str]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _flags(value, getattr(default, f.name))
        elif f.name not in _OF_THE_MACHINE and value != getattr(default, f.name):
            values = value if isinstance(value, tuple) else (value,)
            # Of files the names: where they lie is another matter on another machine.
            shown = [Path(v).name if f.name in ("data_root", "source_weights") else str(v) for v in values]
            yield from (f"--{f.name.replace('_', '-')}", *([] if value is True else shown))


def gather(path: Path, folders: Sequence[Path], told: Row) -> list[Row]:
    """The rows of the file with those of `folders`, which replace older ones of the same cells; writes them.

    What was told of a training stays with it: a folder to which others were added has old ones, too.

    Raises:
        L2TError: a folder is no table, or has no training that is done; the file is no results file.
    """
    rows = read(path)[1] if path.exists() else []
    found = {tuple(row[name] for name in _KEY): row for row in rows}
    for folder in folders:
        new = list(cell_rows(folder, told))
        if not new:
            raise L2TError(f"no training in {folder} is done: give a folder that `l2t-fast table` made.")
        for row in new:
            key = tuple(row[name] for name in _KEY)
            old = found.get(key, {})
            same = all(old.get(name) == row.get(name) for name in _FOUND)
            found[key] = row | ({name: old[name] for name in told if name in old} if same else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_text(path, "".join(json.dumps(row) + "\n" for row in (FIRST, *found.values())))
    return list(found.values())


# What they say


def group_of(row: Row) -> str:
    """What trainings have in common that differ in method, seed and images a class alone."""
    width = "" if row["target_width"] == 1 else f" x {row['target_width']:g}"
    return f"{row['images']}, {' + '.join(row['sources'])} → {row['target']}{width}"


def summaries_of(rows: Iterable[Row], of: str = BEST) -> dict[str, list[Summary]]:
    """Of each group the numbers of its columns, by rising images a class, `of` the best epoch or the last one.

    Raises:
        L2TError: two trainings of one group are of the same method, seed and images a class.
    """
    cells: dict[tuple[str, int | None], dict[tuple[str, int], Cell]] = {}
    for row in rows:
        column = cells.setdefault((group_of(row), row["per_class"]), {})
        if (row["method"], row["seed"]) in column:
            what = f"{row['method']} with seed {row['seed']} and {row['per_class']} images a class"
            raise L2TError(
                f"{group_of(row)} has two trainings of {what}: put tables of other settings in another file."
            )
        result = row if of == BEST else {name: value for name, value in row.items() if name != BEST}
        column[row["method"], row["seed"]] = Cell(row["method"], row["seed"], result)
    known = [method for method in METHODS if any(method == m for column in cells.values() for m, _ in column)]
    groups: dict[str, list[Summary]] = {}
    for (group, size), column in sorted(cells.items(), key=lambda item: item[0][1] or 10**9):
        title = f"{size} a class" if size else "all images"
        summary = summarize(Column(title, list(column.values()), per_class=size, group=group), known)
        groups.setdefault(group, []).append(summary)
    return groups


def difference(found: Comparison) -> str:
    """ "−1.20 (p = 0.012)", or that it is not significant, or why nobody can say."""
    if found.difference is None:
        return DASH
    points = f"{found.difference:+.2f}".replace("-", "−")
    if found.p is None:
        return f"{points} ({found.pairs} seed{'s' * (found.pairs != 1)}: no p)"
    return f"{points} ({'' if found.p < SIGNIFICANT else 'not significant, '}p = {found.p:.2g})"


def markdown(title: str, rows: Sequence[Row], against: str) -> str:
    """The whole of FILE.md."""
    epochs = {of: summaries_of(rows, of) for of in (BEST, LAST)}
    if any(summary.metric == LAST for found in epochs[BEST].values() for summary in found):
        del epochs[BEST]
    names = {BEST: "of the epoch that is best by validation", LAST: "of the last epoch"}
    parts = [
        f"# {title}",
        f"Test accuracy in %, {' and '.join(names[of] for of in epochs)}: mean ± sample std over n seeds. Beside it "
        f"the method minus {against}, paired by seed (over all sizes: by seed and size), with the p of a two-sided "
        f"t-test, not corrected for the number of methods; not significant: p is {SIGNIFICANT} or more.",
    ]
    for group in epochs[LAST]:
        parts += [f"## {group}"]
        for of, found in epochs.items():
            parts += [f"{names[of].capitalize()}:", to_markdown(_grid(found[group], against))]
        parts += _trained([row for row in rows if group_of(row) == group])
    for of, found in epochs.items():
        parts += _across(found, against, names[of])
    return "\n\n".join(parts) + "\n"


def _grid(summaries: Sequence[Summary], against: str) -> Grid:
    header, bold = ["method"], set()
    present = [s.method for s in summaries[0].standings if any(_standing(x, s.method).values for x in summaries)]
    lines = [[method] for method in present]
    for summary in summaries:
        seeds = {len(_standing(summary, method).values) for method in present}
        alike = f", n = {max(seeds)}" if len(seeds) == 1 else ""
        header += [f"{summary.title} (%){alike}", f"minus {against}"]
        for i, method in enumerate(present):
            standing = _standing(summary, method)
            if summary.leads(standing):
                bold.add((i, len(header) - 2))
            other = compare(standing.values, _standing(summary, against).values)
            apart = DASH if method == against else difference(other)
            some = "" if alike or not standing.values else f" (n = {len(standing.values)})"
            lines[i] += [mean_std(standing.headline) + some, apart]
    if len(summaries) > 1:
        header.append(f"all sizes, minus {against}")
        for method, line in zip(present, lines, strict=True):
            mine, its = (_over_sizes(summaries, name) for name in (method, against))
            line.append(DASH if method == against else difference(compare(mine, its)))
    return Grid(header, lines, frozenset(bold))


def _over_sizes(summaries: Sequence[Summary], method: str) -> dict[tuple[int, int], float]:
    """Its numbers by size (its place in `summaries`) and seed."""
    return {(i, seed): value for i, s in enumerate(summaries) for seed, value in _standing(s, method).values.items()}


def _standing(summary: Summary, method: str) -> Standing:
    """Where a method stands; one without results where it is not in the table."""
    nothing = Standing(method, 0, {}, None, None, None, None, None, ())
    return next((standing for standing in summary.standings if standing.method == method), nothing)


def _trained(rows: Sequence[Row]) -> list[str]:
    """How: what all have in common, what each method was given, and where."""
    settings: dict[str, None] = {}
    for row in rows:
        settings[", ".join(f"{name.replace('_', ' ')} {row['settings'][name]}" for name in _HOW)] = None
    asked = dict.fromkeys(text for row in rows for text in row["settings"]["asked"])
    where = dict.fromkeys(row["settings"]["where"] for row in rows if row["method"] == "l2t-ww")
    places = dict.fromkeys(
        ", ".join(f"{name} {row[name]}" for name in ("device", "torch", "commit") if name in row) for row in rows
    )
    said = f"Trained with {'; or '.join(settings)}."
    said += f" Of methods: {', '.join(asked)}." if asked else ""
    said += f" λ of l2t-ww: {', '.join(where)}." if where else ""
    said += "".join(f" On {place}." for place in places if place)
    return [said, "```bash\n" + "\n".join(dict.fromkeys(row["command"] for row in rows)) + "\n```"]


def _across(groups: Mapping[str, Sequence[Summary]], method: str, epoch: str) -> list[str]:
    """One method with one source and with several, where groups have the same images and sizes; `epoch`: which one."""
    lines = []
    for group, summaries in groups.items():
        for other, theirs in groups.items():
            if group != other and group.split(", ")[0] == other.split(", ")[0] and "+" in group and "+" not in other:
                sizes = {summary.per_class: summary for summary in theirs}
                for ours in (summary for summary in summaries if summary.per_class in sizes):
                    mine, its = _standing(ours, method), _standing(sizes[ours.per_class], method)
                    if mine.values and its.values:
                        numbers = [mean_std(mine.headline), mean_std(its.headline)]
                        lines.append([f"{group}, {ours.title}", *numbers, difference(compare(mine.values, its.values))])
                        lines[-1].insert(1, other.split(", ")[1])
    if not lines:
        return []
    header = ["several sources", "one source", "several (%)", "one (%)", "difference"]
    return [f"## {method} from several sources and from one, {epoch}", to_markdown(Grid(header, lines))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="FILE.jsonl, made or added to")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of tables that `l2t-fast table` made")
    parser.add_argument("--told", nargs="+", default=[], metavar="NAME=VALUE", help="commit, device, torch, ...")
    parser.add_argument("--against", default="l2t-ww", choices=METHODS, help="the method all others are compared with")
    parser.add_argument("--title", help="of the picture and of the Markdown (default: the name of the file)")


def run(arguments: argparse.Namespace) -> None:
    """Rows, Markdown and picture."""
    file: Path = arguments.file
    told = dict(text.partition("=")[::2] for text in arguments.told)
    rows = gather(file, arguments.folders, told)
    groups, title = summaries_of(rows), arguments.title or file.stem
    save_text(file.with_suffix(".md"), markdown(title, rows, arguments.against))
    say(f"{file.with_suffix('.md')}: {len(rows)} cells")
    if sweeps := sweep_groups([summary for found in groups.values() for summary in found]):
        plot_sweep(file.with_suffix(".png"), title, sweeps)
        say(f"{file.with_suffix('.png')}: accuracy against images a class")
