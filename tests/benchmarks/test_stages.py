"""Stages of `run` and `gpu`."""

import json
from pathlib import Path

import pytest

from benchmarks.stages import Stage, carry_out


def test_a_stage_out_of_time_is_killed_and_said(tmp_path: Path) -> None:
    output = tmp_path / "run.jsonl"
    sleeper = Stage("timeit", ("-n", "1", "-r", "1", "import time; time.sleep(60)"), 1.0, writes=False)
    failing = Stage("timeit", ("1/0",), 60.0, writes=False)
    assert not carry_out([sleeper, failing], [], output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["outcome"] for row in rows] == ["killed after 1 s", "ended with 1"]


def test_what_a_stage_says_is_kept_when_it_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run.jsonl"
    code = "import sys, time; print('to stdout'); print('to stderr', file=sys.stderr); time.sleep(60)"
    assert not carry_out([Stage("timeit", ("-n", "1", "-r", "1", code), 3.0, writes=False)], [], output)
    for told in ((tmp_path / "run.log").read_text(), capsys.readouterr().err):
        assert "to stdout" in told
        assert "to stderr" in told
        assert "killed after 3 s" in told
