"""Two results files beside each other."""

from pathlib import Path

import pytest

from benchmarks.report.compare import compare
from l2t_fast.errors import L2TError
from tests.shared import RESULT_ROWS, write_rows


def test_comparison_of_two_files(tmp_path: Path) -> None:
    faster = [
        {**row, **{name: 0.5 * row[name] for name in ("ms_median", "ms_p20", "ms_p80")}}
        if row.get("by") == "engine"
        else row
        for row in RESULT_ROWS
    ]
    compared = compare(write_rows(tmp_path / "a.jsonl", RESULT_ROWS), write_rows(tmp_path / "b.jsonl", faster))
    lines = [line for line in compared.splitlines() if "tiny" in line]
    assert [("2.00 | differ" in line, "1.00 | within noise" in line) for line in lines] == [
        (False, True),
        (True, False),
    ] * 2
    with pytest.raises(L2TError, match="no measurement in common"):
        compare(tmp_path / "a.jsonl", write_rows(tmp_path / "c.jsonl", RESULT_ROWS[:1]))
