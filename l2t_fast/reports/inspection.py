"""What was learned in a run: which pairs were chosen (λ), and how peaked the weights of the channels are (w).

Reads the files of every training with meta-parameters; writes inspect.md and pictures.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy import stats

from l2t_fast.files import save_text
from l2t_fast.reports.arrays import Array
from l2t_fast.reports.comparison import mean_std, stat
from l2t_fast.reports.grid import Grid, to_markdown, to_rich
from l2t_fast.reports.learned import TOP, Learned, read_learned
from l2t_fast.reports.pictures.learned import plot_learned

_OF_CHANNELS = ["effective channels (%)", "weight on the top 10 % of channels (%)"]


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
        grid, remarks = pair_grid(learned), sentences(learned)
        if len(grid.header) == 1:  # λ is fixed, and w is known at the end only
            parts += [f"## {title}", " ".join(remarks)]
            console.print(f"{title}: {' '.join(remarks)}", highlight=False, soft_wrap=True, markup=False)
            continue
        picture = Path(learned.column) / f"inspect_{learned.method}.png"
        plot_learned(folder / picture, learned, title)
        parts += [
            f"## {title}",
            to_markdown(grid),
            " ".join(remarks),
            f"![{title}](<{picture.as_posix()}>)",
        ]
        console.print(to_rich(grid, title, remarks))
    path = folder / "inspect.md"
    save_text(path, "\n\n".join(parts) + "\n")
    console.print(f"{path} has the same with pictures", highlight=False, soft_wrap=True, markup=False)
    return path


def pair_grid(learned: Learned) -> Grid:
    """A line a pair by falling λ, mean ± std over the seeds; of what the method has something to say about."""
    final, history, effective, top = learned.final, learned.history, learned.effective, learned.top
    order = np.arange(len(learned.names)) if final is None else np.argsort(-final.mean(0), kind="stable")
    header, lines = ["pair"], [[learned.names[p]] for p in order]
    if final is not None and history is not None:
        header += ["λ", "change since epoch 1"]
        for line, p in zip(lines, order, strict=True):
            line += [_over_seeds(final[:, p]), _signed(_changes(history[:, :, p]))]
    if effective is not None and top is not None:
        header += _OF_CHANNELS
        for line, p in zip(lines, order, strict=True):
            line += [_over_seeds(100 * effective[:, p], 1), _over_seeds(100 * top[:, p], 1)]
    return Grid(header, lines)


def _changes(history: Array) -> Array:
    """Last epoch − first epoch of each seed; history: [seeds, epochs]."""
    return np.array([row[~np.isnan(row)][-1] - row[0] for row in history])


def _over_seeds(values: Array, digits: int = 2) -> str:
    return mean_std(stat([float(value) for value in values if not np.isnan(value)]), digits)


def _signed(values: Array) -> str:
    text = _over_seeds(values)
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
            f"the most peaked pair: {np.nanmin(np.nanmean(learned.effective, 0)):.0%}), and the top {TOP:.0%} of the "
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
