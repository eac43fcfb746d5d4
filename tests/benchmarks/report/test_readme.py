"""The README's numbers."""

from pathlib import Path

import pytest

from benchmarks.report import readme
from benchmarks.rows import RESULTS
from l2t_fast.errors import L2TError
from tests.shared import RESULT_ROWS, write_rows


def test_numbers_of_the_readme_come_from_the_file_it_names() -> None:
    content = readme.README.read_text()
    name = content.split(readme.MARKERS[0].split("{}")[0])[1].split(" ")[0]
    assert readme.readme_block(RESULTS / name) in content


def test_update_of_a_readme(tmp_path: Path) -> None:
    file, text = write_rows(tmp_path / "run.jsonl", RESULT_ROWS), tmp_path / "README.md"
    text.write_text(f"before\n{readme.MARKERS[0].format('old.jsonl')}\n17.3 ms\n{readme.MARKERS[1]}\nafter\n")
    readme.update_readme(file, text)
    content = text.read_text()
    assert content.startswith("before\n<!-- measured: run.jsonl -->")
    assert content.endswith("<!-- /measured -->\nafter\n")
    assert "17.3" not in content
    text.write_text("no markers")
    with pytest.raises(L2TError, match="0 places"):
        readme.update_readme(file, text)
