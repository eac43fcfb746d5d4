"""A column of a table in numbers: means and spreads over the seeds, and every method against the best baseline.

Accuracies come in as fractions, as in result.json, and go out in %; std is the sample's (n - 1) everywhere.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from l2t_fast.choices import LEARNING
from l2t_fast.reports.column import Cell, Column

DASH = "–"  # for what there is not
_SAME = 1e-9  # % points below which two numbers are one: what is left of them in floating point


@dataclass(frozen=True)
class Stat:
    """Mean and sample std of n numbers; std is None for one of them."""

    mean: float
    std: float | None
    n: int


def stat(values: Sequence[float]) -> Stat | None:
    """Mean and sample std; None of nothing."""
    if not values:
        return None
    return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean_std(values: Stat | None, digits: int = 2) -> str:
    """ "70.27 ± 0.09", without ± for a single number, a dash for none."""
    if values is None:
        return DASH
    spread = "" if values.std is None else f" ± {values.std:.{digits}f}"
    return f"{values.mean:.{digits}f}{spread}"


@dataclass(frozen=True)
class Comparison:
    """A method minus the best baseline, paired over the seeds that both have.

    `difference` is the mean in % points (None without a common seed), `p` that of a two-sided paired t-test, None
    where it is undefined, and then `why` says why.
    """

    difference: float | None
    pairs: int
    p: float | None
    why: str = ""


def compare(values: Mapping[Any, float], baseline: Mapping[Any, float]) -> Comparison:
    """`values` minus `baseline` (accuracy in % by seed), paired by seed, with the p of a two-sided paired t-test."""
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return Comparison(None, 0, None, "no seed is common to both")
    ours, theirs = np.array([values[s] for s in seeds]), np.array([baseline[s] for s in seeds])
    difference = float((ours - theirs).mean())
    if len(seeds) < 2:
        return Comparison(difference, 1, None, "one common seed has no spread")
    if np.ptp(ours - theirs) <= _SAME:
        # t is 0/0 or infinite: p would be nothing or 0, and neither is knowledge about the methods.
        return Comparison(difference, len(seeds), None, "the difference is the same for every seed, without spread")
    return Comparison(difference, len(seeds), float(stats.ttest_rel(ours, theirs).pvalue))


@dataclass(frozen=True)
class Standing:
    """Where one method stands in one column. `values` holds the headline number of each seed, in %."""

    method: str
    asked: int
    values: Mapping[int, float]
    best: Stat | None
    last: Stat | None
    seconds: Stat | None
    published: tuple[float, float] | None
    comparison: Comparison | None  # None for the best baseline itself, and where there is none
    problems: tuple[str, ...]

    @property
    def is_meta(self) -> bool:
        """Whether it learns what or where to transfer; all others are baselines."""
        return self.method in LEARNING

    @property
    def headline(self) -> Stat | None:
        return stat(list(self.values.values()))


@dataclass(frozen=True)
class Summary:
    """One column in numbers. `metric` is the headline: "test_accuracy_best" (by validation) or "test_accuracy_last"."""

    title: str
    metric: str
    standings: Sequence[Standing]
    baseline: str | None  # the best one
    per_class: int | None
    group: str
    published_in: str

    def leads(self, standing: Standing) -> bool:
        """Whether no method of the column has a higher mean."""
        means = [other.headline.mean for other in self.standings if other.headline]
        return standing.headline is not None and standing.headline.mean >= max(means) - _SAME


def summarize(column: Column, methods: Sequence[str]) -> Summary:
    """The numbers of one column, a line a method; the headline is the best by validation if every training has it."""
    results = [cell.result for cell in column.cells if cell.result is not None]
    validated = bool(results) and all("test_accuracy_best" in result for result in results)
    metric = "test_accuracy_best" if validated else "test_accuracy_last"
    cells = {method: [cell for cell in column.cells if cell.method == method] for method in methods}
    values = {method: _numbers(cells[method], metric, 100) for method in methods}
    means = {m: statistics.fmean(v.values()) for m, v in values.items() if v and m not in LEARNING}
    # Of those with most seeds; the first of equals.
    most = max((len(values[method]) for method in means), default=0)
    complete = [method for method in means if len(values[method]) == most]
    baseline = max(complete, key=lambda method: means[method]) if complete else None
    standings = [
        Standing(
            method=method,
            asked=len(cells[method]),
            values=values[method],
            best=stat(list(_numbers(cells[method], "test_accuracy_best", 100).values())),
            last=stat(list(_numbers(cells[method], "test_accuracy_last", 100).values())),
            seconds=stat(list(_numbers(cells[method], "seconds", 1).values())),
            published=column.published.get(method),
            comparison=None
            if baseline in (None, method) or not values[method]
            else compare(values[method], values[baseline or ""]),
            problems=_problems(cells[method]),
        )
        for method in methods
    ]
    return Summary(column.title, metric, standings, baseline, column.per_class, column.group, column.published_in)


def sweep_groups(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """The groups of columns that differ in images per class, by rising number, None (all images) last."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        if summary.group:
            groups.setdefault(summary.group, []).append(summary)
    order = {name: sorted(found, key=lambda s: s.per_class or math.inf) for name, found in groups.items()}
    return {name: found for name, found in order.items() if len({s.per_class for s in found}) > 1}


def _numbers(cells: Sequence[Cell], key: str, scale: float) -> dict[int, float]:
    return {cell.seed: scale * cell.result[key] for cell in cells if cell.result is not None and key in cell.result}


def _problems(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The reasons of the cells without a result, and what failed after one, each once with its seeds."""
    seeds: dict[str, list[int]] = {}
    for cell in cells:
        if cell.result is None or cell.problem:
            seeds.setdefault(cell.problem or "no result yet", []).append(cell.seed)
    return tuple(
        f"seed{'s' * (len(found) > 1)} {', '.join(map(str, found))}: {problem.rstrip('.')}."
        for problem, found in seeds.items()
    )
