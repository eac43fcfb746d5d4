"""Whatever is killed, whenever, goes on to the bit."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from l2t_fast.training.log import read_metrics
from tests.runs.commands import SMALL, arguments
from tests.runs.nursery import Nursery

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="forks, and reads /proc"),
]

RUN = [*SMALL[:-4], "--seeds", "0", "--method"]


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    with Nursery(tmp_path / "log") as process:
        yield process


def command(folder: Path, *new: str) -> list[str]:
    """Begins a run, or goes on with it where it has begun."""
    more = ["--resume"] if (folder / "run/config.json").exists() else new
    return ["train", "--runs", str(folder), "--name", "run", *more]


def metrics(folder: Path) -> dict[Path, list[dict[str, Any]]]:
    found = {path.relative_to(folder): read_metrics(path) for path in folder.glob("**/metrics.jsonl")}
    assert found
    return found


def unharmed(folder: Path, wanted: dict[Path, list[dict[str, Any]]]) -> None:
    assert metrics(folder) == wanted
    assert not list(folder.glob("**/*.part"))


def test_killed_at_file_operations(tmp_path: Path, nursery: Nursery) -> None:
    """Every third of them, from the first to the last."""
    whole, new = tmp_path / "whole", [*RUN, "at", "--epochs", "2"]
    operations = nursery.done(command(whole, *new), folder=str(whole))["operation"]
    assert operations > 20
    wanted = metrics(whole)
    for at in range(1, operations + 1, 3):
        folder = tmp_path / f"killed-{at}"
        killed = nursery.run(command(folder, *new), folder=str(folder), phase="operation", call=at)
        assert killed == -signal.SIGKILL, f"operation {at} was not reached"
        nursery.done(command(folder, *new))
        unharmed(folder, wanted)


def test_killed_while_it_trains_saves_and_validates(tmp_path: Path, nursery: Nursery) -> None:
    """Sixteen kills, four in each run one after the other, each at a random moment of a random call."""
    whole, new = tmp_path / "whole", [*RUN, "l2t-ww", "--epochs", "6"]
    counts = nursery.done(command(whole, *new))
    wanted, chance = metrics(whole), random.Random(0)
    for number in range(4):
        folder = tmp_path / f"killed-{number}"
        for phase in ("training", "saving", "validating", chance.choice(["training", "saving", "validating"])):
            call = chance.randint(1, counts[phase] // 4)  # of those that are left there are so many
            killed = nursery.run(command(folder, *new), phase=phase, call=call, after=chance.uniform(1e-4, 0.02))
            assert killed == -signal.SIGKILL, f"run {number}: call {call} while {phase} was not reached"
        nursery.done(command(folder, *new))
        unharmed(folder, wanted)


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for path in Path(f"/proc/{process}/task").glob("*/children") for word in path.read_text().split()]


def test_parent_and_workers_of_a_table_killed(tmp_path: Path, nursery: Nursery) -> None:
    """Two workers one after the other while the parent goes on, then the parent twice; the same command goes on."""
    given = ["--method", "scratch", "l2t-ww", "--seeds", "0", "--epochs", "12"]
    whole = tmp_path / "whole"
    nursery.done(arguments(whole, "grid", *given))
    wanted, chance = metrics(whole), random.Random(1)

    def begun(tries: float = 60.0) -> None:
        """Waits for new lines of a training of a cell, and a little more."""
        deadline = time.monotonic() + tries
        before = size()
        while size() == before and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("killed/grid/*/*/seed-*/metrics.jsonl"))

    killed = arguments(tmp_path / "killed", "grid", *given)
    for _ in range(2):
        parent = nursery.start(killed)
        begun()
        workers = [process for process in children(parent) if b"spawn_main" in cmdline(process)]
        os.kill(chance.choice(workers), signal.SIGKILL)
        begun()
        os.kill(parent, signal.SIGKILL)
        assert nursery.ended() == -signal.SIGKILL
    nursery.done(killed)
    unharmed(tmp_path / "killed", wanted)


def cmdline(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""
