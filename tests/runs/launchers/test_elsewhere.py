"""Ray and submitit, as they are: a cluster of this machine, and submitit's local executor."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from l2t_fast.cli import main
from l2t_fast.errors import Interrupted
from l2t_fast.runs import workers
from l2t_fast.runs.launchers.base import Launcher
from l2t_fast.runs.launchers.ray_cluster import OnRay
from l2t_fast.runs.launchers.submitit_jobs import Submitit
from l2t_fast.runs.progress import Display, StopSignal
from l2t_fast.training.log import read_metrics
from tests.runs.commands import SMALL, rows, table
from tests.runs.launchers.shared import Breaks, Counts, DiesOnce

pytestmark = pytest.mark.slow

GIVEN = {"ray": ["--launcher", "ray"], "submitit": ["--launcher", "submitit", "--submitit", "cluster=local"]}
FEW = [*SMALL, "--epochs", "40", "--seeds", "0", "--method", "scratch", "fm-single"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(params=["ray", "submitit"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("cluster")
    else:
        submitit = pytest.importorskip("submitit")
        # Of a job that left no result it waits for a file system to show it; here there is none to wait for.
        request.getfixturevalue("monkeypatch").setattr(submitit.core.core.Job, "_results_timeout_s", 0)
    return str(request.param)


def launcher(name: str, folder: Path) -> Launcher:
    return OnRay(0) if name == "ray" else Submitit(folder / "submitit", 0, ("cluster=local",))


def when(ready: Callable[[], bool], act: Callable[[], Any]) -> threading.Thread:
    """Acts once, as soon as it may."""

    def wait() -> None:
        until = time.monotonic() + 120
        while not ready() and time.monotonic() < until:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_tasks_are_worked_off(tmp_path: Path, name: str) -> None:
    """One is lost with its process the first time, one raises; what they tell is shown."""
    tasks = [DiesOnce(tmp_path / "lost"), Breaks(tmp_path / "broken"), Counts(tmp_path / "counted")]
    with (tmp_path / "out").open("w") as file, Display(Console(file=file, width=200)) as display:
        failed = workers.work_off(tasks, 3, 1, display, StopSignal(), launcher(name, tmp_path))
    assert failed == [(tasks[1], f"ZeroDivisionError, see {tmp_path / 'broken/error.txt'}")]
    assert [(tmp_path / each / "runs").read_text().split()[0] for each in ("lost", "counted")] == ["1", "1"]
    shown = (tmp_path / "out").read_text()
    for each in ("lost", "counted"):
        assert f"{each} · epoch 1/1 · loss 0.250" in shown
        assert f"{each}: fine" in shown
    assert (" is tried once more, with 3 side by side" in shown) == (name == "submitit")  # Ray does it by itself


def test_what_has_not_begun_stops_too(tmp_path: Path, name: str) -> None:
    stop, tasks = StopSignal(), [Counts(tmp_path / str(i)) for i in range(4)]
    thread = when(lambda: any(tmp_path.glob("*/runs")), lambda: setattr(stop, "asked", True))
    with Display(Console(quiet=True)) as display, pytest.raises(Interrupted):
        workers.work_off(tasks, 1, 1, display, stop, launcher(name, tmp_path))
    thread.join()
    assert not (tmp_path / "3/runs").exists()


def test_cells_are_those_of_one_process(tmp_path: Path, name: str) -> None:
    """To the bit: once a worker is killed, once the user stops all and goes on."""
    whole = table(tmp_path, "whole", *FEW, "--jobs", "1")
    command = ["table", "--runs", str(tmp_path), "--name", "far", *FEW, *GIVEN[name]]
    cell = tmp_path / "far/digits-vgg9_bn-10/scratch/seed-0"

    hit: list[int] = []

    def kill() -> None:
        worker = json.loads((cell / ".lock").read_text())["pid"]
        os.kill(worker, signal.SIGKILL)
        hit.append(worker)

    killing = when((cell / "last.pt").exists, kill)
    other = tmp_path / "far/digits-vgg9_bn-10/fm-single/seed-0"
    stopping = when(
        lambda: (other / "last.pt").exists() and not killing.is_alive(),
        lambda: os.kill(os.getpid(), signal.SIGINT),
    )
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 128 + signal.SIGINT
    killing.join()
    stopping.join()
    assert hit
    assert hit[0] != os.getpid()
    assert len(list((tmp_path / "far").glob("digits*/*/*/last.pt"))) == 2
    assert len(list((tmp_path / "far").glob("digits*/*/*/result.json"))) < 2, "stopped too late to show anything"
    main(command)
    assert rows(tmp_path / "far", "cells.csv") == rows(whole, "cells.csv")
    for path in whole.glob("**/metrics.jsonl"):
        assert read_metrics(tmp_path / "far" / path.relative_to(whole)) == read_metrics(path)
