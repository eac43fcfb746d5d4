"""What was learned in a run: which pairs were chosen (λ), and how peaked the weights of the channels are (w).

Reads the metrics.jsonl and learned.json of every training with meta-parameters; writes inspect.md and pictures.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor

from l2t_fast.errors import L2TError
from l2t_fast.files import save_text
from l2t_fast.methods import METHODS
from l2t_fast.reports.pictures.learned import plot_learned
from l2t_fast.reports.pictures.weights import Array, ragged
from l2t_fast.reports.table import mean_std, stat
from l2t_fast.training.log import read_metrics

_TOP = 0.1  # the share of the channels whose weight is told
_HEADER_OF_CHANNELS = ["effective channels (%)", "weight on the top 10 % of channels (%)"]


@dataclass(frozen=True)
class Learned:
    """What one method learned in one column, by seed and pair; nan where a seed has not got so far.

    `layers` holds (source, m, n) of each pair, the source "" if there is one alone; None before a training has ended.
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


def inspect(folder: Path, console: Console) -> Path:
    """Prints what the run in `folder` learned; returns folder/inspect.md, which says the same and shows the pictures.

    Args:
        folder: of a training run (METHOD/seed-K/) or of a table (COLUMN/METHOD/seed-K/). The picture of a method,
            inspect_METHOD.png, is put beside the folder of the method.

    Raises:
        L2TError: `folder` is no run, nothing in it has meta-parameters, or one of its files is damaged.
    """
    found = read_learned(folder)
    parts = [f"# What {folder.resolve().name} learned"]
    for learned in found:
        title = ", ".join(filter(None, (learned.column, learned.method)))
        header, lines, remarks = table_header(learned), table_lines(learned), sentences(learned)
        if len(header) == 1:  # λ is fixed, and w is known at the end only
            parts += [f"## {title}", " ".join(remarks)]
            console.print(f"{title}: {' '.join(remarks)}", highlight=False, soft_wrap=True, markup=False)
            continue
        picture = Path(learned.column) / f"inspect_{learned.method}.png"
        plot_learned(folder / picture, learned, title)
        parts += [
            f"## {title}",
            _markdown_table(header, lines),
            " ".join(remarks),
            f"![{title}](<{picture.as_posix()}>)",
        ]
        table = Table(title=Text(title), title_justify="left", caption=" ".join(remarks), caption_justify="left")
        for j, name in enumerate(header):
            table.add_column(Text(name), justify="left" if j == 0 else "right")
        for line in lines:
            table.add_row(*map(Text, line))
        console.print(table)
    path = folder / "inspect.md"
    save_text(path, "\n\n".join(parts) + "\n")
    console.print(f"{path} has the same with pictures", highlight=False, soft_wrap=True, markup=False)
    return path


def peakedness(w: Tensor) -> dict[str, Any]:
    """How peaked channel weights w [N, C_s] are, each row with sum 1: the "channels" entry of learned.json.

    "channels": C_s. "effective": exp(mean entropy) / C_s, the share of the channels that would have the mean entropy
    of the N rows if their weights were equal: 1 is uniform, 1/C_s a single channel. "profile": C_s * w in falling
    order within each row, mean over the rows, C_s numbers with mean 1.
    """
    w = w.detach().double().cpu()
    channels = w.shape[1]
    entropy = torch.special.entr(w).sum(1).mean()
    profile = w.sort(1, descending=True).values.mean(0) * channels
    return {"channels": channels, "effective": entropy.exp().item() / channels, "profile": profile.tolist()}


def top_weight(profile: Sequence[float], share: float = _TOP) -> float:
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


def _read(column: str, method: str, cells: Sequence[Path]) -> Learned | None:
    """None if the method has no meta-parameters, or no training of it has ended an epoch."""
    read = {int(cell.name.removeprefix("seed-")): _read_cell(cell) for cell in cells}
    read = {seed: read[seed] for seed in sorted(read) if read[seed][0]}
    if not read:
        return None
    seeds = list(read)
    contents = [learned for _, learned, _ in read.values()]
    told = next((content for content in contents if content is not None), None)
    weights = [[row["pair_weights"] for row in rows] for rows, _, _ in read.values()]  # [seeds][epochs][P]
    pairs = len(weights[0][0])
    if told is not None and any(c is not None and c["pairs"] != told["pairs"] for c in contents):
        raise L2TError(
            f"the seeds of {cells[0].parent} have other pairs than each other: inspect a run of one setting."
        )
    names = told["pairs"] if told is not None else [f"pair {p + 1}" for p in range(pairs)]
    # λ = 1 to the last bit is no learned one; learned.json says it outright.
    fixed = "pair_weights" not in told if told is not None else all(w == [1.0] * pairs for ws in weights for w in ws)
    final = history = None
    if not fixed:
        ends = [(c or {}).get("pair_weights") or ws[-1] for c, ws in zip(contents, weights, strict=True)]
        final = np.array(ends, dtype=np.float64)
        history = np.stack([ragged([[w[p] for w in ws] for ws in weights]) for p in range(pairs)], axis=2)
    effective = top = profiles = None
    if told is not None and "channels" in told:
        each = [c["channels"] if c is not None else None for c in contents]
        known = [entries for entries in each if entries is not None]
        nothing: list[dict[str, Any]] = [{"effective": np.nan, "profile": [np.nan]}] * pairs
        effective = np.array([[entry["effective"] for entry in entries or nothing] for entries in each])
        top = np.array([[top_weight(entry["profile"]) for entry in entries or nothing] for entries in each])
        profiles = [np.array([entries[p]["profile"] for entries in known]) for p in range(pairs)]
    return Learned(
        column=column,
        method=method,
        seeds=seeds,
        names=names,
        layers=None
        if told is None
        else [_layers(*of) for of in zip(names, told["source"], told["target"], strict=True)],
        final=final,
        history=history,
        effective=effective,
        top=top,
        profiles=profiles,
        under_way={seed: len(rows) for seed, (rows, _, ended) in read.items() if not ended},
    )


def _layers(name: str, m: str, n: str) -> tuple[str, str, str]:
    """(source, m, n); the name of a pair has "SOURCE:" before it where there are several sources."""
    prefix = name.removesuffix(f"{m} → {n}")
    return prefix.removesuffix(":"), m, n


def _read_cell(cell: Path) -> tuple[list[dict[str, Any]], Mapping[str, Any] | None, bool]:
    """(the epoch lines that have λ and are of a method with meta-parameters, learned.json, whether the cell ended)."""
    metrics, content = cell / "metrics.jsonl", cell / "learned.json"
    try:
        rows = read_metrics(metrics) if metrics.exists() else []
        learned = json.loads(content.read_text()) if content.exists() else None
    except ValueError as error:
        raise L2TError(f"a file in {cell} is damaged ({error}): train that part anew.") from error
    if learned is not None and not {"pairs", "source", "target"} <= learned.keys():
        raise L2TError(f"{content} is not what a training writes: train that part anew.")
    epochs = [row for row in rows if "iteration" not in row and "pair_weights" in row and "meta_loss" in row]
    return epochs, learned, (cell / "result.json").exists()


def table_header(learned: Learned) -> list[str]:
    """The columns of the table: those that the method has something to say about."""
    header = ["pair"]
    if learned.final is not None:
        header += ["λ", "change since epoch 1"]
    if learned.effective is not None:
        header += _HEADER_OF_CHANNELS
    return header


def table_lines(learned: Learned) -> list[list[str]]:
    """A line a pair, mean ± std over the seeds, by falling λ."""
    order = np.arange(len(learned.names))
    if learned.final is not None:
        order = np.argsort(-learned.final.mean(0), kind="stable")
    lines = []
    for p in order:
        line = [learned.names[p]]
        if learned.final is not None and learned.history is not None:
            line += [_told(learned.final[:, p]), _signed(_changes(learned.history[:, :, p]))]
        if learned.effective is not None and learned.top is not None:
            line += [_told(100 * learned.effective[:, p], 1), _told(100 * learned.top[:, p], 1)]
        lines.append(line)
    return lines


def _changes(history: Array) -> Array:
    """Last epoch − first epoch of each seed; history: [seeds, epochs]."""
    return np.array([row[~np.isnan(row)][-1] - row[0] for row in history])


def _told(values: Array, digits: int = 2) -> str:
    return mean_std(stat([float(value) for value in values if not np.isnan(value)]), digits)


def _signed(values: Array) -> str:
    text = _told(values)
    return text.replace("-", "−") if values.mean() < 0 else f"+{text}"


def sentences(learned: Learned) -> list[str]:
    """What the numbers say: who has most of Σλ, whether the seeds agree, how many channels count."""
    said = []
    if learned.final is not None:
        mean = learned.final.mean(0)
        best = np.argsort(-mean, kind="stable")[: 3 if len(mean) > 3 else 1]
        if mean.sum() <= 0:
            said.append("λ is zero for every pair: nothing is transferred.")
        else:
            share = mean[best].sum() / mean.sum()
            names = ", ".join(learned.names[p] for p in best)
            off = int((mean == 0).sum())
            said.append(
                f"The top {len(best)} of {len(mean)} pairs ({names}) have {share:.0%} of Σλ; equal weights would give "
                f"them {len(best) / len(mean):.0%}{f'; λ is 0 for {off} of all' if off else ''}."
            )
        said.append(_agreement(learned.final))
    else:
        said.append("λ is fixed.")
    if learned.effective is not None and learned.top is not None:
        said.append(
            f"By the entropy of w, {np.nanmean(learned.effective):.0%} of the channels are effective (uniform: 100%; "
            f"the most peaked pair: {np.nanmin(np.nanmean(learned.effective, 0)):.0%}), and the top {_TOP:.0%} of the "
            f"channels hold {np.nanmean(learned.top):.0%} of the weight."
        )
    for seed, epochs in learned.under_way.items():
        said.append(f"Seed {seed} has not ended: {epochs} epoch{'s' * (epochs != 1)} so far.")
    return said


def _agreement(final: Array) -> str:
    """Rank correlation of λ between the seeds; final: [seeds, P]."""
    if len(final) < 2:
        return "One seed says nothing about whether seeds agree."
    if final.shape[1] < 3 or any(np.ptp(row) == 0 for row in final):
        return "The pairs have no ranking that seeds could agree on."
    rho = [float(stats.spearmanr(a, b).statistic) for a, b in combinations(final, 2)]
    word = "agree" if min(rho) > 0.7 else "disagree" if np.mean(rho) < 0.3 else "agree in part"
    spread = f", from {min(rho):.2f} to {max(rho):.2f}" if len(rho) > 1 else ""
    return (
        f"The {len(final)} seeds {word} on the ranking of the pairs: Spearman's ρ of λ between two seeds is "
        f"{np.mean(rho):.2f}{' on average' * (len(rho) > 1)}{spread}."
    ).replace("-", "−")


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])
