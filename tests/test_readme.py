"""The README's example runs as it stands, but for downloaded weights and the size of the images."""

import re
from pathlib import Path

import pytest


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert example.count("\n") <= 13
    offline = example.replace('weights="DEFAULT"', "weights=None").replace("224, 224", "64, 64")
    assert offline != example
    names: dict[str, object] = {}
    exec(offline, names)
    assert len(names["learner"].pairs) == 16  # type: ignore[attr-defined]
    assert "'meta_loss': " in capsys.readouterr().out
