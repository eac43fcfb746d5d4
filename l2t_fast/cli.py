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
from typing import Annotated, Any

import tyro
from rich.console import Console

from l2t_fast.environment import be_patient, version_of
from l2t_fast.errors import Interrupted, L2TError, MachineError, OutputClosed, memory_watched
from l2t_fast.settings.given import with_file, without_set
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

_DESCRIPTION = """Learning What and Where to Transfer (arXiv 1905.05901).

`l2t-fast --version` says which this is; `l2t-fast --tyro-print-completion bash` (or zsh, tcsh) prints what completes
its commands and options in a shell."""

# The commands import what they run after the arguments are read, so that --help answers at once.


class _Output(Console):
    """The terminal, or who reads what is printed; a training whose reader leaves saves and stops."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _to_nowhere()
        raise OutputClosed


def _loading(console: Console) -> contextlib.AbstractContextManager[object]:
    """Says so in a terminal: PyTorch takes seconds."""
    return console.status("loading PyTorch") if not console.quiet else contextlib.nullcontext()


def _to_nowhere() -> None:
    """What is still to be printed, at the end of the process too, goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _surroundings() -> None:
    """What a shell may have left in a state that libraries cannot work with.

    Raises:
        MachineError: the working folder is gone.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: a file that is opened later must not be in its place
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    if os.environ.get("COLUMNS") == "0":  # rich would print nothing
        del os.environ["COLUMNS"]
    os.environ["MPLBACKEND"] = "agg"  # pictures are files
    try:
        os.getcwd()
    except OSError as error:
        raise MachineError(f"the working folder cannot be had ({error.strerror}): change to another one.") from error


def _say(text: str, **how: Any) -> None:
    """Prints to stderr, if that can be had; what the name of a file would have the terminal do is spelled."""
    text = "".join(c if c.isprintable() or c == "\n" or "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in text)
    with contextlib.suppress(OSError):
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True, **how)


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


# Read by `without_set`, before the options are; here for --help.
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set")]


def train(
    settings: tyro.conf.OmitArgPrefixes[TrainConfig], config: Path | None = None, overrides: Overrides = ()
) -> None:
    """Train a target network with what source networks know, and say what came out.

    Without arguments: digits. A small source network learns the digits 0-4, then a target learns 5-9 from ten images
    each, from scratch and with L2T-ww, three seeds; a table and pictures at the end.

    Args:
        config: config.json of a run, or its folder, by default none: its settings, in a run of its own; options that
            are given beside it count instead of what it says
        overrides: settings by their names in config.json, such as optim.lr=0.05 seeds=0,1 (of one method alone:
            --settings)
    """
    console = _Output(quiet=settings.quiet)
    with _loading(console):
        from l2t_fast.runs.run import run

    run(with_file(settings, config, _GIVEN.get()), console, _GIVEN.get())


def table(
    settings: tyro.conf.OmitArgPrefixes[TableConfig], config: Path | None = None, overrides: Overrides = ()
) -> None:
    """Train methods x targets x seeds side by side, and write the table.

    Without arguments: all methods on digits, three seeds. The same command goes on after any interruption, and may be
    given more methods, targets and seeds: a cell that is done is not trained again.

    Args:
        config: table.json of a table, or its folder, by default none: its settings; options that are given beside it
            count instead of what it says
        overrides: settings by their names in table.json, such as optim.lr=0.05 seeds=0,1 (of one method alone:
            --settings)
    """
    console = _Output(quiet=settings.quiet)
    with _loading(console):
        from l2t_fast.runs.table import run

    if not run(with_file(settings, config, _GIVEN.get()), console):
        raise L2TError("some cells have failed: the table says why; the same command tries them again.")


def pretrain(
    settings: tyro.conf.OmitArgPrefixes[PretrainConfig], config: Path | None = None, overrides: Overrides = ()
) -> None:
    """Train a source network from scratch; its checkpoint is for --source-weights.

    Args:
        config: config.json of such a run, or its folder, by default none: its settings, in a run of its own; options
            that are given beside it count instead of what it says
        overrides: settings by their names in config.json, such as optim.lr=0.05 target.target=resnet20 seeds=1
    """
    console = _Output(quiet=settings.quiet)
    with _loading(console):
        from l2t_fast.runs import pretrain

    pretrain.pretrain(with_file(settings, config, _GIVEN.get()), console, _GIVEN.get())


def inspect(
    what: Annotated[str, tyro.conf.Positional],
    target: str | None = None,
    image_size: int = 224,
    batch_size: int = 64,
) -> None:
    """Say and draw what a run has learned; or, of a network, which layers can be matched and what it costs.

    Args:
        what: folder of a run or of a table; or a network, by its name as for --source
        target: of a network: the network to which it is matched, by its name as for --target
        image_size: side of the images, in pixels
        batch_size: images in an iteration
    """
    from l2t_fast.runs.networks import inspect_anything

    inspect_anything(what, target, image_size, batch_size, _Output())


def doctor(runs: Path = Path("runs")) -> None:
    """Say what is installed, what will compute, and what is in the way; exit code 3 where something is.

    Args:
        runs: where the folders of runs are to be
    """
    from l2t_fast.runs import doctor

    doctor.examine(runs, _Output())


def report(run: Annotated[Path, tyro.conf.Positional], results: Path | None = None) -> None:
    """Write RUN/report.html, one page with all of a run or a table, finished or not: curves, pairs, tables, timings.

    Args:
        run: folder of a run or of a table
        results: a file of `python -m benchmarks`, to show measured iterations beside their floors
    """
    from l2t_fast.reports import page

    page.report(run, _Output(), results)


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
        "doctor": doctor,
        "report": report,
        "bench": bench,
    }
    be_patient()
    try:
        _surroundings()
        _print_anything()
        if given[:1] == ["bench"]:  # its arguments are its own
            run_bench(given[1:])
        if given[:1] == ["--version"]:
            print("l2t-fast", version_of("l2t-fast") or "(a checkout that is not installed)")
            return
        given = without_set(given)
        _GIVEN.set(_names(given))
        with memory_watched():
            tyro.extras.subcommand_cli_from_dict(commands, prog="l2t-fast", description=_DESCRIPTION, args=given)
    except L2TError as error:
        _say(f"l2t-fast: {error}", style="red")
        sys.exit(error.status)
    except (OutputClosed, BrokenPipeError):
        _to_nowhere()
        sys.exit(130)
    except OSError as error:  # a path that no system call takes, or what a library met on its way
        where = f"{error.filename!r:.200}: " if error.filename is not None else ""
        _say(f"l2t-fast: {where}{error.strerror or error}: give another path, or mend that.", style="red")
        sys.exit(2 if error.errno == errno.ENAMETOOLONG else 3)
    except ImportError as error:
        if "shared object" not in str(error):
            raise
        _say(f"l2t-fast: a library cannot be loaded ({error}): free memory, or install it again.", style="red")
        sys.exit(3)
    except Interrupted:
        _say("stopped and saved: the same command goes on, `train` and `pretrain` with --resume and the same --name")
        sys.exit(exit_code())
    except KeyboardInterrupt:
        _say("stopped at once: what was saved before is there")
        sys.exit(130)


if __name__ == "__main__":
    main()
