"""Small commands for the tests of runs."""

import csv
from pathlib import Path

import pytest

from l2t_fast.cli import main

SMALL = ["--target-width", "0.0625", "--source-width", "0.25", "--source-epochs", "1", "--jobs", "2", "--threads", "1"]


def arguments(runs: Path, name: str, *more: str) -> list[str]:
    small = SMALL[:-4] if "--jobs" in more else SMALL
    return ["table", "--runs", str(runs), "--name", name, *small, *more]


def table(runs: Path, name: str, *more: str) -> Path:
    main(arguments(runs, name, *more))
    return runs / name


def rows(folder: Path, name: str = "table.csv") -> list[dict[str, str]]:
    """Lines of a CSV file without times."""
    lines = list(csv.DictReader((folder / name).open()))
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def refused(capsys: pytest.CaptureFixture[str], *given: str, command: str = "table") -> str:
    with pytest.raises(SystemExit) as stopped:
        main([command, *given])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split()).removeprefix("l2t-fast: ")
