"""The command `python -m benchmarks`."""

import importlib
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command

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


def test_every_suite_is_a_command() -> None:
    files = {path.stem for path in (ROOT / "benchmarks/suites").glob("*.py")} - {"__init__"}
    assert files == {module.removeprefix("suites.") for module, _ in command.COMMANDS.values() if "suites." in module}
