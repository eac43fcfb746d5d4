"""`python -m benchmarks COMMAND`: every measurement of this project, behind checks of exactness; benchmarks/README.md.

A command is a module with `add_arguments(parser)` and `run(arguments)`, which may give an exit code. Only that of the
command asked for is imported, so that help comes at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from l2t_fast.errors import L2TError

# {command: (module, what it answers)}
COMMANDS = {
    "run": ("run", "what a CPU can tell, or a GPU in time without limit; --quick: within 5 minutes on 2 cores"),
    "gpu": ("gpu", "everything that a GPU owes, stage by stage: tests, iterations, operators, breakdown"),
    "gate": ("suites.gate", "has anything become worse? counts and ratios against expectations.json, for CI"),
    "compare": ("report.compare", "what differs between two results files"),
    "report": (
        "report.markdown",
        "Markdown and pictures of a results file; --readme: also benchmarks/README.md's numbers",
    ),
    "cells": ("report.cells", "tables of trainings as one file of rows, with Markdown and a picture of them"),
    "iterations": ("suites.iterations", "whole iterations: the reference, the official code, the engine in its modes"),
    "operators": ("suites.operators", "the matching operators: Triton, ATen, eager PyTorch, torch.compile"),
    "gram": ("suites.gram", "the Gram form of the matching operators: products saved, digits lost"),
    "steps": ("suites.steps", "the steps of an iteration: inner steps, source pre-pass, input pipeline"),
    "breakdown": ("suites.breakdown", "where the time of an iteration goes, by family of kernels"),
    "training": ("suites.training", "whole trainings: images a second, seconds to an accuracy"),
    "official-accuracy": ("suites.official_accuracy", "does the engine train as the authors' code? losses, accuracies"),
    "jobs": ("suites.jobs", "trainings a minute with one, two, ... side by side"),
    "busy": ("suites.busy", "an iteration beside busy neighbours, its waiting threads spinning or asleep (a CPU)"),
    "scaling": (
        "suites.scaling",
        "bytes and latency against compute, 1 to 1,024 GPUs: a model, what breaks first",
    ),
    "held": ("suites.held", "what long work holds: memory, open files, threads, processes"),
    "sensitivity": ("suites.sensitivity", "how much of the meta-gradient is signal, along a training"),
    "aot": ("suites.aot", "compile every Triton kernel ahead of time, for every architecture; needs no GPU"),
    "precompile": ("suites.precompile", "compile the engine's Triton kernels side by side, for this GPU"),
    "tune": ("suites.tune", "look for faster blocks of the Triton kernels"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Carries out one command; the exit code, 2 on bad input."""
    style = argparse.RawDescriptionHelpFormatter
    listed = "".join(f"  {name:<18}{line}\n" for name, (_, line) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        usage="python -m benchmarks COMMAND ...",
        description=f"Measurements, behind checks of exactness.\n\n{listed}",
        epilog="python -m benchmarks COMMAND --help says more of each.",
        formatter_class=style,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of these")
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(given[:1]).command
    module = importlib.import_module(f"benchmarks.{COMMANDS[command][0]}")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}", description=module.__doc__, formatter_class=style
    )
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(given[1:])) or 0
    except L2TError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
