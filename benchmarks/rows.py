"""Results files: JSON lines, one file a run; the first line says where the others come from.

Every other line is a row with a `kind` ("operator", "iteration", ...) and either what was measured or, under
`unavailable`, why nothing was. Rows are appended as they come, so that a run that is killed keeps them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from l2t_fast.errors import L2TError
from l2t_fast.runs.machine import describe_machine, device_name

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def add_row_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every command that writes rows, for `begin`."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--output", type=Path, help="rows are appended to this file (default: a new one in results/)")
    parser.add_argument("--commit", help="what the file says of the code, where git cannot tell")


def chosen_device(arguments: argparse.Namespace) -> torch.device:
    """The device asked for, made the current one."""
    if arguments.device == "cpu" or (arguments.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    chosen = torch.device("cuda", 0)
    torch.cuda.set_device(chosen)
    return chosen


def begin(benchmark: str, arguments: argparse.Namespace) -> torch.device:
    """Makes `arguments.output` a file with a first line, unless another stage of the run has begun it.

    Returns:
        the device to measure on
    """
    device = chosen_device(arguments)
    arguments.output = arguments.output or new_path(benchmark, device)
    if not arguments.output.exists():
        here = ("output", "commit", "data_root", "official", "source_weights")  # of this machine, not of the run
        config = {name: value for name, value in vars(arguments).items() if name not in here}
        append(arguments.output, header(device, {"benchmark": benchmark, **config}, arguments.commit))
    say(f"rows go to {arguments.output}")
    return device


def header(device: torch.device, config: Row, revision: str | None = None) -> Row:
    """The first line: device, versions, commit, time and `config`, what was asked for."""
    return {
        "kind": "run",
        **describe_machine(device),
        "commit": revision or commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config,
    }


def new_path(benchmark: str, device: torch.device) -> Path:
    """A file of this moment in benchmarks/results/."""
    name = device_name(device).lower().replace(" ", "_")
    return RESULTS / f"{benchmark}_{name}_{datetime.now(timezone.utc):%Y%m%dT%H%M%S}.jsonl"


def latest() -> Path:
    """The last run in benchmarks/results/.

    Raises:
        L2TError: there is none.
    """
    runs = [path for name in ("run", "gpu") for path in RESULTS.glob(f"{name}_*.jsonl")]
    if not runs:
        raise L2TError(f"there is no run in {RESULTS.name}/: start one with `python -m benchmarks run`.")
    return max(runs, key=lambda path: read(path)[0]["time"])


def append(path: Path, row: Row) -> None:
    """Writes one line at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write(path: Path, rows: Iterable[Row], show: Callable[[Row], None]) -> None:
    """Appends rows as they come, and shows them."""
    for row in rows:
        append(path, row)
        show(row)


def read(path: Path) -> tuple[Row, list[Row]]:
    """(first line, the other rows); a last line that a killed run left unfinished is left out.

    Raises:
        L2TError: the file is missing or is no results file.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
        first, *rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if first["kind"] != "run":
            raise ValueError(first["kind"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise L2TError(f"{path} is no results file of this suite: give one that `python -m benchmarks` wrote.") from (
            error
        )
    return first, rows


def unavailable(row: Row, reason: BaseException | str) -> Row:
    """The row of what is not to be had."""
    if isinstance(reason, BaseException):
        lines = str(reason).strip().splitlines() or [""]
        reason = f"{type(reason).__name__}: {lines[0][:200]}"
    return {**row, "unavailable": reason}


def contender_name(row: Row) -> str:
    """What a contender is called: "engine graph bf16", "reference"."""
    words = [row["by"]]
    if row["by"] == "engine" and row.get("mode"):
        words.append(row["mode"])
    if row.get("precision", "fp32") != "fp32":
        words.append(row["precision"])
    if row.get("memory") == "recompute":
        words.append("recompute")
    return " ".join(words)


def commit() -> str:
    """The revision, with a + where files differ from it; results do not count."""

    def git(*command: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command], capture_output=True, text=True, check=False
            )
        except OSError:
            return ""
        return done.stdout.strip()

    revision = git("rev-parse", "--short", "HEAD")
    return revision + "+" * bool(git("status", "--porcelain", ":/", ":!results")) if revision else "unknown"


def say(text: str, columns: Sequence[str] = ()) -> None:
    """Tells how it goes, on stderr."""
    print("".join([f"{text:<40}", *(f"{column:>11}" for column in columns)]).rstrip(), file=sys.stderr, flush=True)
