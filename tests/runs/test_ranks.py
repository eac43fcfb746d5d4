"""`torchrun -m l2t_fast train`: one run on two processes, and what becomes of it when they are killed or stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from l2t_fast import ranks
from l2t_fast.cli import main
from l2t_fast.ranks import current, joined
from l2t_fast.training.log import read_metrics
from tests.runs.commands import SMALL, refused

# A source would take as long as the target.
NEW = [*SMALL[:-6], "--method", "scratch", "--seeds", "0", "--mode", "eager"]
LONG = [*NEW, "--epochs", "2000"]


def command(runs: Path, *more: str, restarts: int = 0) -> list[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return [sys.executable, "-m", *torchrun, "-m", "l2t_fast", "train", "--runs", str(runs), "--name", "run", *more]


@contextmanager
def under_way(runs: Path, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A long run on two ranks that has saved once."""
    job = subprocess.Popen(
        command(runs, *LONG, restarts=restarts), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(runs / "run/scratch/seed-0/last.pt", job)
        yield job
    finally:
        if job.poll() is None:
            for pid in children(job.pid):
                os.kill(pid, signal.SIGKILL)
            job.kill()
            job.communicate()


def wait_for(path: Path, job: subprocess.Popen[str], since: float = 0.0) -> None:
    end = time.monotonic() + 300
    while not (path.exists() and path.stat().st_mtime > since):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.3)


def children(pid: int) -> list[int]:
    """The ranks, in their order."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def iterations(runs: Path) -> list[tuple[int, int]]:
    """(epoch, iteration) of each line."""
    rows = read_metrics(runs / "run/scratch/seed-0/metrics.jsonl")
    return [(row["epoch"], row["iteration"]) for row in rows if "iteration" in row]


def numbers(row: dict[str, Any]) -> list[float]:
    return [x for value in row.values() for x in (value if isinstance(value, list) else [value])]


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_micro_batches(tmp_path: Path) -> None:
    """The source too; in float32, in which the order of sums counts."""
    settings = [*SMALL[:-4], "--method", "l2t-ww", "--seeds", "0", "--epochs", "2"]
    main(["train", "--runs", str(tmp_path / "one"), "--name", "run", *settings, "--accumulate", "2"])
    done = subprocess.run(command(tmp_path / "two", *settings), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("folder of the run") == 1
    for part in ("source", "l2t-ww/seed-0"):
        one, two = (read_metrics(tmp_path / name / "run" / part / "metrics.jsonl") for name in ("one", "two"))
        assert len(one) == len(two)
        for ours, theirs in zip(one[:6], two[:6], strict=True):
            assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-3, abs=1e-5)
    result = json.loads((tmp_path / "two/run/l2t-ww/seed-0/result.json").read_text())
    assert 0 < result["test_accuracy_last"] <= 1
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with under_way(tmp_path) as job:
        os.kill(children(job.pid)[1], signal.SIGTERM)  # one of them is enough
        output, _ = job.communicate(timeout=300)
    assert output.count("stopped and saved") == 2
    assert "exitcode  : 143" in output
    done = len(iterations(tmp_path))
    resumed = subprocess.Popen(
        command(tmp_path, "--resume"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last = tmp_path / "run/scratch/seed-0/last.pt"
    wait_for(last, resumed, last.stat().st_mtime)
    resumed.send_signal(signal.SIGTERM)  # to torchrun, which sends it on
    output, _ = resumed.communicate(timeout=300)
    assert "goes on from" in output
    assert output.count("stopped and saved") == 2
    steps = iterations(tmp_path)
    assert len(steps) > done
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_with_a_message(rank: int, tmp_path: Path) -> None:
    with under_way(tmp_path) as job:
        start = time.monotonic()
        os.kill(children(job.pid)[rank], signal.SIGKILL)
        output, _ = job.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert job.returncode != 0
    assert "another rank has ended" in output
    assert "l2t_fast/ranks.py" not in output  # a sentence, and no traceback of ours


@pytest.mark.slow
def test_torchrun_begins_again_where_the_last_checkpoint_is(tmp_path: Path) -> None:
    last = tmp_path / "run/scratch/seed-0/last.pt"
    with under_way(tmp_path, restarts=1) as job:
        before = last.stat().st_mtime
        os.kill(children(job.pid)[1], signal.SIGKILL)
        wait_for(last, job, before)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=300)
    assert "goes on from" in output
    steps = iterations(tmp_path)
    assert steps == sorted(set(steps))


def test_a_table_is_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(capsys).startswith("`table` is one process")


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # somebody else's
    with joined("cpu") as alone:
        assert alone is current()
        assert (alone.count, alone.first(lambda: 5), alone.total(3), alone.most(2)) == (1, 5, 3, 2)


def test_a_rank_0_that_does_not_come_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the start before has left names a port that is another program's by now."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(ranks, "_TIMEOUT", timedelta(seconds=1))
    other, left = (ranks._c10d.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(2))
    other.set("name", "of another")
    left.set("l2t_fast/start", f"l2t_fast/{other.port}/before")
    with pytest.raises(RuntimeError, match="rank 0 does not answer"):
        ranks._this_start(left, 1)


def test_accumulate_is_in_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--accumulate 0 is not to be had" in refused(capsys, "--accumulate", "0", command="train").replace(
        "accumulate=0", "--accumulate 0"
    )
