"""The command line `l2t-fast`.

Exit codes: 0 done; 2 bad input, or a training that failed; 3 the machine would not, as with a full disk; stopped and
saved 130 (Ctrl-C, a closed pipe), 143 (SIGTERM) or 129 (SIGHUP).
"""

import codecs
import contextlib
import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from l2t_fast.environment import be_patient
from l2t_fast.errors import Interrupted, L2TError, OutputClosed, memory_watched
from l2t_fast.settings.options import PretrainConfig, TableConfig, TrainConfig
from l2t_fast.signals import exit_code

# The names of the options on the command line: given means given, also where it is what would be so by itself.
_GIVEN: ContextVar[frozenset[str]] = ContextVar("_GIVEN", default=frozenset())

# What stands for a letter where the output cannot have it.
_ASCII = {
    "→": "->",
    "±": "+-",
    "·": "-",
    "−": "-",
    "–": "-",
    "×": "x",
    "…": "...",
    "λ": "lambda",
    "θ": "theta",
    "φ": "phi",
    "β": "beta",
    "τ": "tau",
    "α": "alpha",
    "Δ": "delta",
    "μ": "mu",
}

# The commands import what they run after the arguments are read, so that --help answers at once.


class _Output(Console):
    """The terminal, or who reads what is printed; a training whose reader leaves saves and stops."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _to_nowhere()
        raise OutputClosed


def _to_nowhere() -> None:
    """What is still to be printed, at the end of the process too, goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def _print_anything() -> None:
    """Lets streams that cannot have every letter have another one instead."""
    codecs.register_error("l2t_fast", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="l2t_fast")


def train(config: tyro.conf.OmitArgPrefixes[TrainConfig]) -> None:
    """Train a target network with what source networks know, and say what came out.

    Without arguments: digits. A small source network learns the digits 0-4, then a target learns 5-9 from ten images
    each, from scratch and with L2T-ww, three seeds; a table and pictures at the end.
    """
    from l2t_fast.runs.run import run

    run(config, _Output(), _GIVEN.get())


def table(config: tyro.conf.OmitArgPrefixes[TableConfig]) -> None:
    """Train methods x targets x seeds side by side, and write the table.

    Without arguments: all methods on digits, three seeds. The same command goes on after any interruption, and may be
    given more methods, targets and seeds: a cell that is done is not trained again.
    """
    from l2t_fast.runs.table import run

    if not run(config, _Output()):
        raise L2TError("some cells have failed: the table says why; the same command tries them again.")


def pretrain(config: tyro.conf.OmitArgPrefixes[PretrainConfig]) -> None:
    """Train a source network from scratch; its checkpoint is for --source-weights."""
    from l2t_fast.runs import pretrain

    pretrain.pretrain(config, _Output(), _GIVEN.get())


def inspect(run: Annotated[Path, tyro.conf.Positional]) -> None:
    """Say and draw what a run or a table has learned: which pairs were chosen, and how peaked the channel weights are.

    Args:
        run: folder of a run or of a table
    """
    from l2t_fast.reports import inspection

    inspection.inspect(run, _Output())


def bench() -> None:
    """Measure: the same as `python -m benchmarks` in a checkout (`l2t-fast bench --help`)."""


def run_bench(arguments: Sequence[str]) -> None:
    """Runs `python -m benchmarks` of the checkout in the working directory, and exits as it does."""
    if not Path("benchmarks/__main__.py").is_file():
        raise L2TError("the benchmarks are not installed: run `l2t-fast bench` in a checkout of the repository.")
    sys.exit(subprocess.run([sys.executable, "-m", "benchmarks", *arguments], check=False).returncode)


def _names(arguments: Sequence[str]) -> frozenset[str]:
    """Of "--beta 0.5 --no-nesterov" beta and nesterov."""
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    return frozenset([*flags, *(flag.removeprefix("no_") for flag in flags)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with the codes above."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[..., None]] = {
        "train": train,
        "table": table,
        "pretrain": pretrain,
        "inspect": inspect,
        "bench": bench,
    }
    be_patient()
    _print_anything()
    _GIVEN.set(_names(given))
    try:
        if given[:1] == ["bench"]:  # its arguments are its own
            run_bench(given[1:])
        with memory_watched():
            tyro.extras.subcommand_cli_from_dict(commands, prog="l2t-fast", args=given)
    except L2TError as error:
        Console(stderr=True).print(f"l2t-fast: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.status)
    except (OutputClosed, BrokenPipeError):
        _to_nowhere()
        sys.exit(130)
    except OSError as error:  # a path that no system call takes, or what a library met on its way
        where = f"{error.filename!r:.200}: " if error.filename is not None else ""
        why = f"{where}{error.strerror or error}: give another path, or mend that."
        Console(stderr=True).print(f"l2t-fast: {why}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if error.errno == errno.ENAMETOOLONG else 3)
    except Interrupted:
        Console(stderr=True).print(
            "stopped and saved: the same command goes on, `train` and `pretrain` with --resume and the same --name",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(exit_code())
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped at once: what was saved before is there", highlight=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
