"""A grid of text, some of it bold, as a table in Markdown and as one for the terminal."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A table as text: header, lines, and the (line, place in it) that are bold."""

    header: list[str]
    lines: list[list[str]]
    bold: Set[tuple[int, int]] = frozenset()


def to_markdown(grid: Grid) -> str:
    """The grid as Markdown, the first of each line to the left, all others to the right."""
    rule = ["---"] + ["---:"] * (len(grid.header) - 1)
    lines = [
        [f"**{plain(text)}**" if (i, j) in grid.bold else plain(text) for j, text in enumerate(line)]
        for i, line in enumerate(grid.lines)
    ]
    return markdown_table([plain(text) for text in grid.header], rule, lines)


def markdown_table(header: Sequence[str], rule: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already; `rule` says how each column is aligned ("---", "---:")."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])


def to_rich(grid: Grid, title: str, remarks: Sequence[str]) -> "Table":
    """The same for the terminal, with `remarks` below."""
    from rich.table import Table  # here, as Markdown needs none of it
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", caption=Text(" ".join(remarks)), caption_justify="left")
    for j, name in enumerate(grid.header):
        table.add_column(Text(name), justify="left" if j == 0 else "right", overflow="fold")
    for i, line in enumerate(grid.lines):
        table.add_row(*(Text(text, style="bold" if (i, j) in grid.bold else "") for j, text in enumerate(line)))
    return table


def plain(text: str) -> str:
    """Text of others on one line, where no sign of it makes a table's border."""
    return " ".join(text.split()).replace("|", "\\|")
