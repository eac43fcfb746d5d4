"""docs/watching.md keeps its word: its example runs, its picture is there, and what it names exists."""

import re
import struct
from pathlib import Path

import pytest

from l2t_fast.cli import main

DOCS = Path(__file__).parents[1] / "docs"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "watching.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert re.fullmatch(r"scratch, seed 0: \d+\.\d% on the validation images at best\n", capsys.readouterr().out)
    assert (tmp_path / "runs/best/table.md").exists()


def test_the_commands_it_names_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "watching.md").read_text()
    for command in ("train", "report"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        for flag in re.findall(r"--[a-z][a-z-]*", " ".join(re.findall(rf"l2t-fast {command} [^`\n]*", text))):
            assert flag in said
    for flag in ("--log", "--quiet"):
        assert flag in text


def test_its_picture_is_there_and_small() -> None:
    picture = (DOCS / "report.png").read_bytes()
    assert len(picture) < 200_000
    width, height = struct.unpack(">II", picture[16:24])
    assert min(width, height) > 400
