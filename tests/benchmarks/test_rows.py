"""Results files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.report import markdown
from benchmarks.rows import RESULTS, read
from l2t_fast.errors import L2TError

ROOT = Path(__file__).parents[2]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("[]\n")
    with pytest.raises(L2TError, match="no results file"):
        read(path)


def test_committed_files_are_read() -> None:
    files = set(RESULTS.glob("*.jsonl")) - {RESULTS / "aot.jsonl"}  # whose rows are kernels, and nothing else
    assert files
    assert all(read(file)[1] for file in files)


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    """The operators are many rows: the run is killed as soon as the first of them is there."""
    output = tmp_path / "run.jsonl"
    command = [sys.executable, "-m", "benchmarks", "operators", "--device", "cpu", "--cases", "minute"]
    command += ["--no-compile", "--precisions", "fp32", "--rounds", "100000", "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (output.exists() and len(output.read_text().splitlines()) > 1):
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with output.open("a") as file:
        file.write('{"kind": "operator", "case": "min')  # what a kill in the middle of a line leaves
    first, rows = read(output)
    assert first["config"]["benchmark"] == "operators"
    assert rows[0]["kind"] == "rates"
    assert "Some" not in markdown.write(output).read_text()
