"""What a CPU can tell, or a GPU in time without limit: the suites one after the other, and a report.

`--quick` is done within 5 minutes on 2 cores.
"""

import argparse

from benchmarks.cases import CASES
from benchmarks.rows import add_row_arguments
from benchmarks.stages import SWEEP, Stage, add_data_arguments, perform, suite
from l2t_fast.errors import L2TError


def quick_stages() -> list[Stage]:
    """Limits add up to five minutes."""
    reachable = ("--accuracy", "0.4", "--most-epochs", "6")
    sweep = ("--sweep", "1", "4")
    few = ("--methods", "scratch", "lwf+at", "fm-one-to-one", "l2t-w-single", "l2t-w-one-to-one", "l2t-ww")
    return [
        suite(15, "operators", "--cases", "tiny", "--precisions", "fp32", "--no-compile", "--rounds", "7"),
        suite(25, "steps", "--cases", "tiny", "--batch", "12", "--rounds", "7"),
        suite(130, "iterations", "--cases", "cifar", "--batch", "8", "--rounds", "3"),
        suite(75, "iterations", "--cases", "tiny", "--batch", "12", "--rounds", "5", "--others", *sweep),
        suite(20, "breakdown", "--cases", "tiny", "--batch", "12"),
        suite(35, "training", "--epochs", "1", "--case", "tiny", "--per-class", "10", *few, *reachable),
    ]


def stages(cases: list[str]) -> list[Stage]:
    return [
        suite(1200, "operators", "--cases", *cases),
        suite(1200, "steps", "--cases", *cases),
        suite(3600, "iterations", "--cases", *cases, "--others", *SWEEP),
        suite(600, "breakdown", "--cases", *cases),
        suite(3600, "training"),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_row_arguments(parser)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: tiny cifar)")
    parser.add_argument("--quick", action="store_true", help="done within 5 minutes on 2 cores")
    add_data_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """All stages; the exit code."""
    if unknown := set(arguments.cases) - set(CASES):
        raise L2TError(f"there is no case {min(unknown)}: choose among {', '.join(CASES)}.")
    return perform(
        "run", quick_stages() if arguments.quick else stages(arguments.cases or ["tiny", "cifar"]), arguments
    )
