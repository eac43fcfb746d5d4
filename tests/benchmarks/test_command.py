"""The command `python -m benchmarks`."""

import importlib
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_gpu_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    assert command.main() == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_help_lists_every_command_and_loads_none() -> None:
    code = "import sys\nfrom benchmarks.__main__ import main\n"
    code += "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_is_there_and_explains_itself(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{command.COMMANDS[name][0]}")
    parser = ArgumentParser(description=module.__doc__)
    module.add_arguments(parser)
    assert callable(module.run)
    assert parser.format_help()


def test_stages_of_a_gpu_need_no_more_than_the_engine() -> None:
    """Where nothing can be installed: all of them are imported and take their arguments, and a report is written."""
    code = """
import sys, importlib, argparse, tempfile
from pathlib import Path
for name in ("tyro", "rich", "matplotlib", "scipy", "sklearn", "pynvml", "xdist"):
    sys.modules[name] = None  # cannot be imported
from benchmarks import gpu, rows
from benchmarks.__main__ import COMMANDS
from benchmarks.report import markdown
for name, stage in gpu.stages().items():
    if stage.module == "benchmarks":
        module = importlib.import_module("benchmarks." + COMMANDS[stage.arguments[0]][0])
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        parser.parse_args([*stage.arguments[1:], "--device", "cuda", "--output", "x.jsonl"])
    else:
        assert stage.module == "pytest" and "-n" not in stage.arguments, stage
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "gpu.jsonl"
    rows.append(path, rows.header(rows.chosen_device(argparse.Namespace(device="cpu")), {}, "abc"))
    assert "abc" in markdown.write(path).read_text()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the report has no pictures" in done.stderr


def test_stages_of_a_gpu_are_listed_and_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["gpu", "--help"])
    told = capsys.readouterr().out
    assert all(f"\n  {name} " in told for name in gpu.stages())
    with pytest.raises(SystemExit):
        command.main(["gpu", "--stages", "tests", "nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_every_suite_is_a_command() -> None:
    files = {path.stem for path in (ROOT / "benchmarks/suites").glob("*.py")} - {"__init__"}
    assert files == {module.removeprefix("suites.") for module, _ in command.COMMANDS.values() if "suites." in module}
