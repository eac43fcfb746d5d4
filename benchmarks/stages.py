"""Stages of `run` and `gpu`: each a process of its own with a time limit.

Rows are in the file before the next is measured, and all that a stage says is at once in a file beside them: whatever
is killed, what was measured stays.
"""

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import IO

from benchmarks.report.markdown import write
from benchmarks.rows import append, begin, say
from l2t_fast.environment import PATIENT

ROOT = Path(__file__).parents[1]
SWEEP = ("--sweep", "1", "4", "8", "16")  # T
LAST_WORDS = 5.0  # seconds; a process that a stage left behind may hold its pipe for ever


@dataclass(frozen=True)
class Stage:
    """A module, its arguments, and the seconds after which it is killed."""

    module: str
    arguments: tuple[str, ...]
    limit: float
    writes: bool = True  # rows
    data: tuple[str, ...] = ()  # arguments that say where something lies on this machine: no row tells them

    @property
    def name(self) -> str:
        return " ".join([*([] if self.module == "benchmarks" else [self.module]), *self.arguments])


def suite(limit: float, name: str, *arguments: str) -> Stage:
    """`python -m benchmarks NAME ...`"""
    return Stage("benchmarks", (name, *arguments), limit)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where something lies on this machine, for the stages that read it."""
    parser.add_argument("--official", type=Path, help="a checkout of alinlab/L2T-ww, to be timed beside")
    parser.add_argument("--data-root", type=Path, help="where Fashion-MNIST is (torchvision's root)")


def carry_out(todo: list[Stage], shared: list[str], output: Path) -> bool:
    """Runs the stages, each in a process group of its own; whether all ended well.

    What a stage leaves of its time is the next one's, so that limits bound the whole.
    """
    well, spare, log = True, 0.0, output.with_suffix(".log")
    for stage in todo:
        _tell(f"== {stage.name}", log)
        command = [sys.executable, "-m", stage.module, *stage.arguments, *stage.data]
        command += ["--output", str(output), *shared] if stage.writes else []
        start = perf_counter()
        # Warnings are of others' old code.
        environment = {**PATIENT, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", **os.environ}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=environment, **pipes)
        teller = Thread(target=_pass_on, args=(process.stdout, log), daemon=True)
        teller.start()
        try:
            code = process.wait(stage.limit + spare)
            outcome = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            outcome = f"killed after {stage.limit + spare:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            teller.join(LAST_WORDS)
        seconds = perf_counter() - start
        append(output, {"kind": "stage", "stage": stage.name, "seconds": seconds, "outcome": outcome})
        _tell(f"== {outcome} in {seconds:.0f} s", log)
        well &= outcome == "done"
        spare = max(0.0, stage.limit + spare - seconds)
    return well


def _pass_on(words: IO[bytes], log: Path) -> None:
    """What a stage says, as it says it: to stderr and into the log."""
    with words, log.open("ab") as file:
        while piece := os.read(words.fileno(), 2**16):
            file.write(piece)
            file.flush()
            sys.stderr.write(piece.decode(errors="replace"))
            sys.stderr.flush()


def _tell(text: str, log: Path) -> None:
    say(text)
    with log.open("a") as file:
        file.write(text + "\n")


def perform(command: str, todo: list[Stage], arguments: argparse.Namespace) -> int:
    """Runs the stages and writes the report; whether any ended badly."""
    device = begin(command, arguments)
    well = carry_out([_with_data(stage, arguments) for stage in todo], ["--device", device.type], arguments.output)
    say(f"the report is {write(arguments.output)}")
    return not well


def _with_data(stage: Stage, arguments: argparse.Namespace) -> Stage:
    """The stage with what lies somewhere on this machine."""
    option, where = {
        "iterations": ("--official", arguments.official),
        "training": ("--data-root", arguments.data_root),
    }.get(stage.arguments[0], ("", None))
    return stage if where is None else replace(stage, data=(option, str(where.resolve())))
