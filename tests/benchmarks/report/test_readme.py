"""The README's numbers."""

from pathlib import Path

import pytest

from benchmarks.report import readme
from benchmarks.rows import RESULTS
from l2t_fast.errors import L2TError
from tests.shared import RESULT_ROWS, write_rows


def test_numbers_of_the_readme_come_from_the_file_it_names() -> None:
    content = readme.README.read_text()
    names = [part.split(" ")[0] for part in content.split(readme.MARKERS[0].split("{}")[0])[1:]]
    assert names
    for name in names:
        assert readme.readme_block(RESULTS / name) in content


def test_update_of_a_readme(tmp_path: Path) -> None:
    """Of this device alone."""
    file, text = write_rows(tmp_path / "run.jsonl", RESULT_ROWS), tmp_path / "README.md"
    begin, end = readme.MARKERS
    other = f"{begin.format('other.jsonl')}\nSome CPU, 2 threads\n{end}\n"
    text.write_text(f"before\n{other}{begin.format('old.jsonl')}\nSome GPU, 17.3 ms\n{end}\nafter\n")
    readme.update_readme(file, text)
    content = text.read_text()
    assert content.startswith(f"before\n{other}<!-- measured: run.jsonl -->")
    assert content.endswith("<!-- /measured -->\nafter\n")
    assert "17.3" not in content
    text.write_text(other)
    with pytest.raises(L2TError, match="0 places for what was measured on Some GPU"):
        readme.update_readme(file, text)
