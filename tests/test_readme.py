"""The documents keep their word: the README's example runs, its result is a file's, and what they name exists."""

import re
from pathlib import Path

import pytest

from benchmarks.report.readme import readme_block

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "l2t_fast/README.md",
    "benchmarks/README.md",
    "benchmarks/results/tables/README.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")),
)


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, but for downloaded weights and the size of the images."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example.count("\n") <= 13
    offline = example.replace('weights="DEFAULT"', "weights=None").replace("224, 224", "64, 64")
    assert offline != example
    names: dict[str, object] = {}
    exec(offline, names)
    assert len(names["learner"].pairs) == 16  # type: ignore[attr-defined]
    assert "'meta_loss': " in capsys.readouterr().out


def test_the_results_under_the_title_are_those_of_the_files_they_name() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 120
    (speed,) = re.findall(r"^\*\*Speed:\*\*.*?\n\n", readme, re.DOTALL | re.MULTILINE)
    sentences = re.findall(r"(.*?)\(\[rows\]\((benchmarks/results/\S+\.jsonl)\)", speed, re.DOTALL)
    assert len(sentences) == 2
    for sentence, file in sentences:
        measured = readme_block(ROOT / file)
        numbers = re.findall(r"\*\*\d[\d.]*\*\*|[\d.]+(?= ms)", sentence)
        assert len(numbers) >= 3
        assert [number for number in numbers if number not in measured] == []
    (accuracy,) = re.findall(r"^\*\*Accuracy:\*\*.*?\n\n", readme, re.DOTALL | re.MULTILINE)
    points = re.findall(r"\d+\.\d+", accuracy)
    table = (ROOT / "benchmarks/results/tables/photographs/cifar10-jpeg.md").read_text()
    assert points
    assert [number for number in points if f"| −{number} (p = " not in table] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text)
    assert links or document.startswith(("CONTRIBUTING", "docs/"))
    for path, heading in links:
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, heading


def test_the_house_stands_as_it_is_drawn() -> None:
    """Every path of the tree exists, and it has every room, and every module of the rooms that are drawn in full."""
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = re.findall(r"^```\n(l2t_fast/cli.py.*?)```", contributing, re.DOTALL | re.MULTILINE)
    drawn: set[str] = set()
    above = [""] * 4  # the folder that each depth lies in
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        names = re.findall(r"[\w/]+\.py|[\w/]+/", re.split(r"  +", line.strip())[0])
        drawn.update(above[depth] + name for name in names)
        above[depth + 1 :] = [above[depth] + name for name in names[:1]] * (3 - depth)
    assert [path for path in drawn if not (ROOT / path).exists()] == []
    package = ROOT / "l2t_fast"
    rooms = {f"l2t_fast/{init.parent.name}/" for init in package.glob("*/__init__.py")} - {"l2t_fast/kernels/"}
    in_full = (package, *(package / room for room in ("engine", "learner", "runs", "training", "settings")))
    modules = {str(path.relative_to(ROOT)) for folder in in_full for path in folder.glob("*.py")}
    assert {path for path in rooms | modules if not path.endswith("__init__.py")} - drawn == set()


def test_each_fault_names_a_test_that_exists() -> None:
    lines = [line for line in (ROOT / "docs/faults.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not line.startswith("| fault")]
    named = [re.findall(r"`(tests/\S+\.py)::(test_\w+)`", row) for row in rows]
    assert [row for row, tests in zip(rows, named, strict=True) if not tests] == []
    missing = {
        (file, test) for tests in named for file, test in tests if f"def {test}(" not in (ROOT / file).read_text()
    }
    assert missing == set()
