"""The report of a results file."""

import shutil
from pathlib import Path

import pytest

from benchmarks.report import markdown
from benchmarks.rows import RESULTS
from tests.shared import RESULT_ROWS, write_rows


def test_report_of_a_file(tmp_path: Path) -> None:
    written = markdown.write(write_rows(tmp_path / "run.jsonl", RESULT_ROWS))
    content = written.read_text()
    assert "Some GPU" in content
    assert "| tiny | 4 | 2 | engine eager | 20 (20 – 20) | **2.00** (1.90 – 2.10) |" in content
    assert "no checkout" in content
    assert "no NVML: x" in content
    pictures = {path.name for path in written.parent.glob("*.png")}
    assert pictures == {"speedups.png", "roofline.png", "time_against_T.png", "memory_against_T.png"}
    assert all(f"]({picture})" in content for picture in pictures)


@pytest.mark.parametrize("committed", sorted(RESULTS.glob("*/report.md")), ids=lambda path: path.parent.name)
def test_committed_reports_are_made_from_committed_rows(committed: Path, tmp_path: Path) -> None:
    rows = shutil.copy(committed.parent.with_suffix(".jsonl"), tmp_path)
    assert markdown.write(Path(rows)).read_text() == committed.read_text()
