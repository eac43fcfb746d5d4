"""Everything that a GPU owes, within 9 minutes on an H100: its tests, the suites, and a report."""

import argparse

from benchmarks.rows import add_row_arguments, chosen_device
from benchmarks.stages import SWEEP, Stage, add_data_arguments, perform, suite
from l2t_fast.errors import L2TError


def stages() -> list[Stage]:
    """Limits add up to less than nine minutes; the most telling comes first."""
    both = ("--modes", "graph", "eager")
    return [
        Stage("pytest", ("-q", "-m", "cuda", "tests"), 70, writes=False),
        suite(100, "iterations", "--cases", "cifar", *both, "--rounds", "7", "--others", *SWEEP),
        suite(100, "iterations", "--cases", "imagenet", *both, "--rounds", "5"),
        suite(90, "operators", "--limit", "70", "--compile-seconds", "30"),
        suite(40, "breakdown", "--cases", "cifar", "imagenet", "--modes", "eager", "graph"),
        suite(30, "steps", "--cases", "cifar", "--rounds", "7"),
        suite(30, "training", "--epochs", "3", "--methods", "scratch", "l2t-ww"),
        suite(70, "iterations", "--cases", "cifar", "--modes", "compile", "--rounds", "5"),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    add_data_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """All stages; the exit code."""
    if chosen_device(arguments).type != "cuda":
        raise L2TError("there is no GPU here: `python -m benchmarks run` measures on the CPU.")
    return perform("gpu", stages(), arguments)
