"""The pages of the site: their examples run, their commands parse, and the site is built without a warning."""

import dataclasses
import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from l2t_fast import cli
from l2t_fast.settings import defaults
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.given import with_file
from l2t_fast.settings.options import SourceConfig, TableConfig, TrainConfig
from l2t_fast.settings.stored import save_config

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
# Of the authors' train_l2t_ww.py.
FLAGS = [
    "dataroot",
    "dataset",
    "datasplit",
    "batchSize",
    "workers",
    "source-model",
    "source-domain",
    "source-path",
    "target-model",
    "weight-path",
    "wnet-path",
    "epochs",
    "lr",
    "momentum",
    "wd",
    "nesterov",
    "schedule",
    "beta",
    "pairs",
    "meta-lr",
    "meta-wd",
    "loss-weight",
    "loss-weight-type",
    "loss-weight-init",
    "T",
    "optimizer",
    "experiment",
]


def blocks(page: str, language: str) -> list[str]:
    """What is fenced as `language`, but for what stands below <!-- no-run -->."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"(<!-- no-run -->\n)?^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for marked, block in found if not marked]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_examples_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in one program."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


def test_an_example_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    page = "# A\n\n<!-- no-run -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n\n```python\nx / 0\n```\n"
    (tmp_path / "docs/a.md").write_text(page)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert blocks("a.md", "python") == ["x = 1\n", "x / 0\n"]
    with pytest.raises(ZeroDivisionError):
        test_the_examples_of_a_page_run("a.md", tmp_path, monkeypatch)


def commands(page: str) -> list[list[str]]:
    """The arguments of each `l2t-fast` of a page."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(re.sub(r"^(\w+=\S* )+", "", line), comments=True) for line in lines]  # without variables
    return [line[1:] for line in words if line and line[0].endswith("l2t-fast")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_are_understood(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are parsed, and the settings of runs and tables completed; nothing is trained."""
    seen: list[str] = []
    parse = tyro.extras.subcommand_cli_from_dict

    def recorded(name: str, command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def record(*given: Any, **options: Any) -> None:
            seen.append(name)
            if name in ("train", "table", "pretrain"):
                made = with_file(options["settings"], options.get("config"), cli._GIVEN.get())
                if name != "pretrain" and not getattr(made, "resume", False):
                    (resolve if name == "train" else column_configs)(made)

        return record

    def parsed(of: dict[str, Any], **options: Any) -> Any:
        return parse({name: recorded(name, command) for name, command in of.items()}, **options)

    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", parsed)
    monkeypatch.setattr(cli, "run_bench", lambda arguments: seen.append("bench") or sys.exit(0))
    monkeypatch.chdir(tmp_path)
    source = dataclasses.replace(resolve(TrainConfig(method=("scratch",), seeds=(0,))), source=SourceConfig())
    for folder, config in {"first": resolve(TrainConfig()), "OLD": resolve(TrainConfig()), "teacher": source}.items():
        (tmp_path / "runs" / folder).mkdir(parents=True)
        save_config(config, tmp_path / "runs" / folder / "config.json")
    (tmp_path / "runs/table-digits").mkdir()
    save_config(TableConfig(), tmp_path / "runs/table-digits/table.json")
    given = commands(page)
    codes = [_exit_code(arguments) for arguments in given]
    assert not any(codes), capsys.readouterr().err
    assert len(seen) == len([arguments for arguments in given if not arguments[0].startswith("--")])


@pytest.mark.slow
def test_the_commands_on_digits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would give them, one after the other; on a network of few channels, for one epoch."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    digits = defaults._DEFAULTS["digits"]
    small = {"epochs": 1, "source_epochs": 1, "target_width": 0.0625, "source_width": (0.25,), "seeds": (0,)}
    monkeypatch.setitem(defaults._DEFAULTS, "digits", {**digits, **small})
    monkeypatch.chdir(tmp_path)
    given = [arguments for page in ("index.md", "settings.md", "training.md") for arguments in commands(page)]
    alone = [words for words in given if not {"--dataset", "table", "pretrain", "runs/NAME"}.intersection(words)]
    assert len(alone) > 10
    assert not any(map(_exit_code, alone))
    for made in ("first/table.md", "more/l2t-ww/seed-4/result.json", "mine/l2t-ww/seed-0/target.onnx"):
        assert (tmp_path / "runs" / made).exists()


def _exit_code(arguments: list[str]) -> Any:
    try:
        cli.main(arguments)
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_every_flag_of_the_official_code_stands_beside_ours() -> None:
    text = (ROOT / "docs/from-the-official-code.md").read_text()
    rows = re.findall(r"^\| `--([\w-]+)` \|[^|]*\| ([^|]+) \|", text, re.MULTILINE)
    assert [theirs for theirs, _ in rows] == FLAGS
    known = {name.rpartition(".")[2].replace("_", "-") for name in _options()}
    ours = {flag for _, cell in rows for flag in re.findall(r"--([\w-]+)", cell)}
    assert ours - known == set()


def _options() -> set[str]:
    from l2t_fast.settings.given import _keys

    return {*_keys(TrainConfig()), "name", "runs", "resume"}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_of_the_repository_is_there(page: str) -> None:
    """mkdocs looks at links within docs/ alone."""
    outside = re.findall(r"\]\((\.\./[^)#]+)", (ROOT / "docs" / page).read_text())
    assert [path for path in outside if not (ROOT / "docs" / path).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [page for part in nav for pages in part.values() for entry in pages for page in entry.values()]
    assert sorted(listed) == PAGES


def test_the_site_is_built(tmp_path: Path) -> None:
    """--strict: a link or an anchor that leads nowhere, or a page that is not in the navigation, fails."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert "Raises" in (site / "api.html").read_text()  # from the docstrings
    assert "learning rate of SGD" in (site / "options.html").read_text()
    assert "Which networks" in (site / "python.html").read_text()
    assert (site / "iteration.svg").exists()
    pages = [path.read_text() for path in site.glob("*.html")]
    assert len(pages) > len(PAGES)
    loaded = {
        url for page in pages for url in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', page)
    }
    assert loaded == set()  # nothing from elsewhere
    sources = {source for page in pages for source in re.findall(r'<img[^>]+src="([^"]+)"', page)}
    assert [source for source in sources if not (site / source).exists()] == []


def test_the_citation_is_of_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (version,) = re.findall(r'version="([^"]+)"', (ROOT / "setup.py").read_text())
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors", "license", "preferred-citation"} <= citation.keys()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
