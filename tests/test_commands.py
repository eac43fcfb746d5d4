"""What the command line says of itself, and runs that are repeated from their settings."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from l2t_fast.cli import main
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.training.log import read_metrics

ROOT = Path(__file__).parents[1]
TINY = ["--method", "scratch", "--seeds", "0", "--epochs", "1", "--target-width", "0.0625"]


def test_a_run_is_repeated_from_its_settings(tmp_path: Path) -> None:
    main(["train", "--runs", str(tmp_path), "--name", "one", *TINY])
    again = ["train", "--runs", str(tmp_path), "--config", str(tmp_path / "one/config.json")]
    main([*again, "--name", "two"])
    main([*again, "--name", "three", "--set", "optim.lr=0.05", "optim.nesterov=true"])
    settings = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two", "three")}
    rows = {name: read_metrics(tmp_path / name / "scratch/seed-0/metrics.jsonl") for name in settings}
    assert rows["two"] == rows["one"]
    assert rows["three"][-1] != rows["one"][-1]
    assert settings["two"] == {**settings["one"], "name": "two"}
    optim = {**settings["one"]["optim"], "lr": 0.05, "nesterov": True}
    assert settings["three"] == {**settings["one"], "name": "three", "optim": optim}


def test_what_is_set_reaches_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig | TableConfig] = []
    monkeypatch.setattr("l2t_fast.runs.run.run", lambda config, *others: seen.append(config))
    monkeypatch.setattr("l2t_fast.runs.table.run", lambda config, *others: seen.append(config) or True)
    main(["train", "--lr", "1", "--set", "optim.lr=0.05", "seeds=0,1"])
    main(["table", "--set", "dataset=digits,cifar10", "data.download=true"])
    train, table = seen
    assert isinstance(train, TrainConfig)
    assert isinstance(table, TableConfig)
    assert (train.optim.lr, train.seeds) == (0.05, (0, 1))
    assert (table.dataset, table.data.download) == (("digits", "cifar10"), True)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"l2t-fast {importlib.metadata.version('l2t-fast')}\n"


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_of_torchrun_is_not_taken_down_by_what_python_does_at_its_end(tmp_path: Path, launched: bool) -> None:
    """What aborts there in rare cases is a thread of PyTorch's; here it always does."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os, torch\natexit.register(os.abort)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    environment |= {"TORCHELASTIC_RUN_ID": "a job"} if launched else {}
    command = [sys.executable, "-m", "l2t_fast"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == (0 if launched else -signal.SIGABRT), done.stderr
    if launched:
        assert done.stdout.startswith("l2t-fast ")
        refused = subprocess.run([*command, "nothing"], capture_output=True, text=True, env=environment, cwd=ROOT)
        assert refused.returncode == 2, refused.stderr


def test_python_runs_the_package_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "l2t_fast", "--help"], capture_output=True, text=True, check=True)
    assert "usage: l2t-fast" in done.stdout
    assert "--version" in done.stdout
    assert "--tyro-print-completion" in done.stdout


def test_a_shell_completes_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--tyro-print-completion", "bash"])
    assert not stopped.value.code
    script = tmp_path / "complete.bash"
    script.write_text(capsys.readouterr().out)
    ask = f"""source {script}
COMP_WORDS=(l2t-fast "$@"); COMP_CWORD=$#
$(complete -p l2t-fast | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""

    def completed(*words: str) -> set[str]:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", ask, "bash", *words], capture_output=True, text=True, env=environment)
        return {line.strip() for line in done.stdout.splitlines()}

    assert {"train", "doctor"} <= completed("")
    assert "--inner-steps" in completed("train", "--inner")
