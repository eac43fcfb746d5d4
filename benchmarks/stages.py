"""`python -m benchmarks`: every measurement of this project, behind checks of exactness.

    run [CASES]     what a CPU can tell, or a GPU in time without limit; --quick is done within 5 minutes on 2 cores
    gpu             everything that a GPU owes: its tests, operators, iterations, breakdown; within 9 minutes on an H100
    gate            counts and ratios against expectations.json, for CI; --update writes them anew
    compare A B     what differs between two results files
    report [FILE]   Markdown and pictures of a results file (default: the latest); --readme also writes the README's

Every stage is a process of its own with a time limit, and rows are in the file before the next is measured: whatever
is killed, what was measured stays. Single stages: `python -m benchmarks.suites.operators` (also `--tune`), `.parts`,
`.iterations`, `.breakdown`, `.training`, `.aot`.
"""

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from benchmarks import rows as results
from benchmarks.cases import CASES
from benchmarks.report import markdown as report
from benchmarks.rows import say
from l2t_fast.errors import L2TError

ROOT = Path(__file__).parents[1]
# On a busy CPU a thread that spins while it waits takes the core of the one it waits for: milliseconds become seconds.
PATIENT = {"OMP_WAIT_POLICY": "passive"}


QUICK_SWEEP, SWEEP = ("--sweep", "1", "4"), ("--sweep", "1", "4", "8", "16")  # T


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
        return " ".join([self.module.removeprefix("benchmarks.suites."), *self.arguments])


def benchmark(limit: float, module: str, *arguments: str) -> Stage:
    return Stage(f"benchmarks.suites.{module}", arguments, limit)


def quick_stages() -> list[Stage]:
    """Limits add up to five minutes."""
    reachable = ("--accuracy", "0.4", "--most-epochs", "6")
    few = ("--methods", "scratch", "lwf+at", "fm-one-to-one", "l2t-w-single", "l2t-w-one-to-one", "l2t-ww")
    return [
        benchmark(15, "operators", "--cases", "tiny", "--precisions", "fp32", "--no-compile", "--rounds", "7"),
        benchmark(25, "steps", "--cases", "tiny", "--batch", "12", "--rounds", "7"),
        benchmark(130, "iterations", "--cases", "cifar", "--batch", "8", "--rounds", "3"),
        benchmark(75, "iterations", "--cases", "tiny", "--batch", "12", "--rounds", "5", "--others", *QUICK_SWEEP),
        benchmark(20, "breakdown", "--cases", "tiny", "--batch", "12"),
        benchmark(35, "training", "--epochs", "1", "--case", "tiny", "--per-class", "10", *few, *reachable),
    ]


def stages(cases: list[str]) -> list[Stage]:
    return [
        benchmark(1200, "operators", "--cases", *cases),
        benchmark(1200, "steps", "--cases", *cases),
        benchmark(3600, "iterations", "--cases", *cases, "--others", *SWEEP),
        benchmark(600, "breakdown", "--cases", *cases),
        benchmark(3600, "training"),
    ]


def gpu_stages() -> list[Stage]:
    """Limits add up to less than nine minutes; the most telling comes first."""
    both = ("--modes", "graph", "eager")
    return [
        Stage("pytest", ("-q", "-m", "cuda", "tests"), 70, writes=False),
        benchmark(100, "iterations", "--cases", "cifar", *both, "--rounds", "7", "--others", *SWEEP),
        benchmark(100, "iterations", "--cases", "imagenet", *both, "--rounds", "5"),
        benchmark(90, "operators", "--limit", "70", "--compile-seconds", "30"),
        benchmark(40, "breakdown", "--cases", "cifar", "imagenet", "--modes", "eager", "graph"),
        benchmark(30, "steps", "--cases", "cifar", "--rounds", "7"),
        benchmark(30, "training", "--epochs", "3", "--methods", "scratch", "l2t-ww"),
        benchmark(70, "iterations", "--cases", "cifar", "--modes", "compile", "--rounds", "5"),
    ]


def carry_out(todo: list[Stage], shared: list[str], output: Path) -> bool:
    """Runs the stages, each in a process group of its own; whether all ended well.

    What a stage leaves of its time is the next one's, so that limits bound the whole.
    """
    well, spare = True, 0.0
    for stage in todo:
        say(f"== {stage.name}")
        command = [sys.executable, "-m", stage.module, *stage.arguments, *stage.data]
        command += ["--output", str(output), *shared] if stage.writes else []
        start = perf_counter()
        environment = {**PATIENT, "PYTHONWARNINGS": "ignore", **os.environ}  # warnings of others' old code
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=environment)
        try:
            code = process.wait(stage.limit + spare)
            outcome = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            outcome = f"killed after {stage.limit + spare:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = perf_counter() - start
        results.append(output, {"kind": "stage", "stage": stage.name, "seconds": seconds, "outcome": outcome})
        say(f"== {outcome} in {seconds:.0f} s")
        well &= outcome == "done"
        spare = max(0.0, stage.limit + spare - seconds)
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = results.parser(None, add_help=False)
    run = commands.add_parser("run", parents=[common], help="measure")
    run.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: tiny cifar)")
    run.add_argument("--quick", action="store_true", help="done within 5 minutes on 2 cores")
    gpu = commands.add_parser("gpu", parents=[common], help="everything that a GPU owes")
    for command in (run, gpu):
        command.add_argument("--official", type=Path, help="a checkout of alinlab/L2T-ww, to be timed beside")
        command.add_argument("--data-root", type=Path, help="where Fashion-MNIST is (torchvision's root)")
    gate = commands.add_parser("gate", help="has anything become worse?")
    gate.add_argument("--update", action="store_true", help="write expectations.json anew")
    compare = commands.add_parser("compare", help="two results files")
    compare.add_argument("files", nargs=2, type=Path, metavar="FILE")
    reporting = commands.add_parser("report", help="Markdown and pictures")
    reporting.add_argument("file", nargs="?", type=Path, help="default: the latest of benchmarks/results/")
    reporting.add_argument("--readme", action="store_true", help="also write the README's numbers")
    arguments = parser.parse_args()
    try:
        return perform(arguments)
    except L2TError as error:
        say(f"benchmarks: {error}")
        return 2


def perform(arguments: argparse.Namespace) -> int:
    """Carries out one command; the exit code."""
    if arguments.command == "gate":
        from benchmarks.suites import gate

        return gate.run(arguments.update)
    if arguments.command == "compare":
        print(report.compare(*arguments.files))
        return 0
    if arguments.command == "report":
        file = arguments.file or results.latest()
        if arguments.readme:
            report.update_readme(file)
        say(f"the report is {report.write(file)}")
        return 0
    device = results.device(arguments)
    if arguments.command == "gpu":
        if device.type != "cuda":
            raise L2TError("there is no GPU here: `python -m benchmarks run` measures on the CPU.")
        todo = gpu_stages()
    else:
        if unknown := set(arguments.cases) - set(CASES):
            raise L2TError(f"there is no case {min(unknown)}: choose among {', '.join(CASES)}.")
        todo = quick_stages() if arguments.quick else stages(arguments.cases or ["tiny", "cifar"])
    results.start(arguments.command, arguments, device)
    shared = ["--device", device.type]
    todo = [_with_data(stage, arguments) for stage in todo]
    well = carry_out(todo, shared, arguments.output)
    say(f"the report is {report.write(arguments.output)}")
    return not well


def _with_data(stage: Stage, arguments: argparse.Namespace) -> Stage:
    """The stage with what lies somewhere on this machine."""
    wanted = {"benchmarks.suites.iterations": "official", "benchmarks.suites.training": "data_root"}.get(stage.module)
    where = getattr(arguments, wanted) if wanted else None
    if where is None or wanted is None:
        return stage
    return replace(stage, data=(f"--{wanted.replace('_', '-')}", str(where.resolve())))


if __name__ == "__main__":
    sys.exit(main())
