"""The report of a results file."""

from pathlib import Path

from benchmarks.report import markdown
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
