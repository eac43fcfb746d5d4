"""One grid, in Markdown and in the terminal."""

from rich.console import Console

from l2t_fast.reports.grid import Grid, to_markdown, to_rich

GRID = Grid(["method", "a | b"], [["scratch", "1.0"], ["[red]l2t\nww", "2.0"]], {(1, 1)})


def test_a_grid_in_markdown_keeps_the_borders_of_its_table() -> None:
    assert to_markdown(GRID).splitlines() == [
        "| method | a \\| b |",
        "| --- | ---: |",
        "| scratch | 1.0 |",
        "| [red]l2t ww | **2.0** |",
    ]


def test_the_same_grid_in_the_terminal_is_no_markup() -> None:
    console = Console(width=80)
    table = to_rich(GRID, "[b]title", ["one.", "two."])
    assert [column.justify for column in table.columns] == ["left", "right"]
    with console.capture() as capture:
        console.print(table)
    for text in ("[b]title", "a | b", "[red]l2t", "2.0", "one. two."):
        assert text in capture.get()
