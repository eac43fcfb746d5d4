"""Everything that a GPU owes, stage by stage, and a report.

Any stages may be chosen, so that a GPU that is lent for minutes at a time gets through them in several calls. Those
that time iterations want `precompile` before them, on the same machine. Results files of several calls put one after
the other (cat) are one results file. The stages, with the seconds after which each is killed:
"""

import argparse
import os
from importlib.util import find_spec

from benchmarks.rows import add_row_arguments, chosen_device
from benchmarks.stages import SWEEP, Stage, add_data_arguments, perform, suite
from l2t_fast.errors import L2TError

WORKERS = 8  # processes that test side by side


def stages() -> dict[str, Stage]:
    """The most telling come first; torch.compile, which takes minutes, last."""
    both = ("--modes", "graph", "eager")
    graph = ("--modes", "graph")
    cifar, imagenet = ("--cases", "cifar"), ("--cases", "imagenet")
    return {
        "precompile": suite(240, "precompile"),
        "tests": _tests(300, "not compile"),
        "iterations-cifar": suite(240, "iterations", *cifar, *both, "--rounds", "7"),
        "iterations-imagenet": suite(400, "iterations", *imagenet, *both, "--rounds", "5"),
        "breakdown-cifar": suite(120, "breakdown", *cifar, *both),
        "breakdown-imagenet": suite(150, "breakdown", *imagenet, *graph),
        "operators": suite(200, "operators", "--limit", "150", "--compile-seconds", "60"),
        "sweep-cifar": suite(200, "iterations", *cifar, *graph, "--precisions", "fp32", "--rounds", "5", *SWEEP),
        "others-cifar": suite(90, "iterations", *cifar, *graph, "--precisions", "fp32", "--rounds", "5", "--others"),
        "steps": suite(120, "steps", *cifar, "--rounds", "7"),
        "training": suite(60, "training", "--epochs", "3", "--methods", "scratch", "l2t-ww"),
        "replicas": suite(300, "jobs", "--replicas", "1", "2", "4", "8", "--cases", "tiny", "cifar", "--rounds", "5"),
        "tests-compile": _tests(300, "compile"),
        "compile-cifar": suite(400, "iterations", *cifar, "--modes", "compile", "--rounds", "5"),
    }


def _tests(limit: float, which: str) -> Stage:
    """Side by side where pytest-xdist is there; a file that cannot be imported ends no other's tests."""
    side_by_side = ("-n", str(min(WORKERS, os.cpu_count() or 1))) if find_spec("xdist") else ()
    words = ("-q", *side_by_side, "--continue-on-collection-errors", "--durations", "15", "-m", "cuda", "-k", which)
    return Stage("pytest", (*words, "tests"), limit, writes=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = stages()
    lines = (f"  {name:<20}{stage.limit:4.0f}  {stage.name}\n" for name, stage in known.items())
    parser.description = f"{__doc__}\n{''.join(lines)}"
    add_row_arguments(parser)
    parser.add_argument(
        "--stages", nargs="+", choices=known, default=list(known), metavar="STAGE", help="in this order (default: all)"
    )
    add_data_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """The stages asked for; the exit code."""
    if chosen_device(arguments).type != "cuda":
        raise L2TError("there is no GPU here: `python -m benchmarks run` measures on the CPU.")
    known = stages()
    return perform("gpu", [known[name] for name in arguments.stages], arguments)
