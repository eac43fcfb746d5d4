"""What the terminal shows before, while and after something is trained."""

import contextlib
import importlib
import io
from pathlib import Path

import pytest
from rich.console import Console

from l2t_fast.cli import main
from l2t_fast.runs import run as run_module
from l2t_fast.runs.run import run
from l2t_fast.settings.options import OptimConfig, SourceConfig, TargetConfig, TrainConfig
from l2t_fast.settings.stored import load_config
from l2t_fast.training.watch import Callback
from tests.runs.commands import SMALL

STAGES = ["reading the images", "building the networks", "finding the layers", "examining the networks", "first step"]
QUICK = [*SMALL[:-4], "--epochs", "1", "--seeds", "0"]


def config(runs: Path, **more: object) -> TrainConfig:
    return TrainConfig(
        name="run",
        runs=runs,
        seeds=(0,),
        source=SourceConfig(source_width=(0.25,), source_epochs=1),
        target=TargetConfig(target_width=0.0625),
        optim=OptimConfig(epochs=1),
        **more,  # type: ignore[arg-type]
    )


def test_lines_say_what_is_done_before_the_first_iteration(tmp_path: Path) -> None:
    """Where there is no terminal; each once before anything is trained, and once for all trainings."""
    out = io.StringIO()
    told: list[str] = []

    class Titles(Callback):
        def on_start(self, training: object) -> None:
            told.append(training.title)  # type: ignore[attr-defined]

    run(config(tmp_path, method=("scratch", "fm-single"), log=("csv",)), Console(file=out, width=300), (), [Titles()])
    lines = out.getvalue().splitlines()
    checked = [line.partition(" · ")[2] for line in lines if line.startswith("checking · ")]
    assert checked == ["reading the images", "building the networks", "examining the networks", "finding the layers"]
    after = [line.partition(" · ")[2] for line in lines if " · " in line and not line.startswith("checking")]
    assert "first step, on 25 images of 32x32" in after
    trained = [line.partition(", on ")[0] for line in after]
    assert [line for line in trained if line in STAGES] == [
        *("reading the images", "building the networks", "examining the networks", "first step"),  # the source's
        "finding the layers",  # of fm-single
    ]
    assert trained.index("first step") < next(i for i, line in enumerate(trained) if "it/s" in line)
    assert told == ["scratch, seed 0", "fm-single, seed 0"]
    for folder in ("source", "scratch/seed-0", "fm-single/seed-0"):
        assert (tmp_path / "run" / folder / "iterations.csv").read_text().startswith("epoch,iteration,lr,loss,")


def test_a_terminal_shows_them_beside_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    whole = run_module.TrainingWatch._show

    def show(watch: run_module.TrainingWatch, state: str, advance: int = 0) -> None:
        shown.append(state)
        whole(watch, state, advance)

    monkeypatch.setattr(run_module.TrainingWatch, "_show", show)
    out = io.StringIO()
    run(config(tmp_path, method=("fm-single",)), Console(file=out, width=200, force_terminal=True))
    of_cell = shown[len(shown) - shown[::-1].index("reading the images") - 1 :]
    assert [stage for state in of_cell if (stage := state.partition(", on ")[0]) in STAGES] == STAGES
    assert "epoch 1/1 · loss" in of_cell[len(STAGES)]
    assert "it/s" in out.getvalue()


def test_quiet_prints_errors_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--network", "resnet8", "--width", "0.25", "--epochs", "1", "--classes", "0", "1"]
    main(["pretrain", "--runs", str(tmp_path), "--name", "run", *given, "--quiet"])
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "run/source.pt").exists()
    for command in ("train", "table", "pretrain"):
        with pytest.raises(SystemExit):
            main([command, "--runs", str(tmp_path), "--name", "../x", "--quiet"])
        out, error = capfd.readouterr()
        assert (out, "is not the name of a folder" in error) == ("", True)


@pytest.mark.parametrize(("module", "name"), [("run", "run"), ("table", "run"), ("pretrain", "pretrain")])
def test_every_command_may_be_quiet(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    consoles: list[Console] = []

    def seen(config: object, console: Console, *given: object) -> bool:
        consoles.append(console)
        return True

    monkeypatch.setattr(importlib.import_module(f"l2t_fast.runs.{module}"), name, seen)
    for more in ([], ["--quiet"]):
        main([{"run": "train"}.get(module, module), *more])
    assert [console.quiet for console in consoles] == [False, True]


def test_a_run_that_goes_on_may_tell_others(tmp_path: Path) -> None:
    given = ["train", "--runs", str(tmp_path), "--name", "run", *QUICK, "--method", "scratch"]
    main([*given, "--quiet"])
    folder = tmp_path / "run/scratch/seed-0"
    assert not (folder / "epochs.csv").exists()
    (folder / "result.json").unlink()
    main([*given[:5], "--resume", "--log", "csv"])
    assert len((folder / "epochs.csv").read_text().splitlines()) == 2
    assert load_config(tmp_path / "run/config.json").log == ("csv",)
    assert "invalid choice" in _rejected([*given[:3], "--log", "wandb"])


def _rejected(arguments: list[str]) -> str:
    out = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        main(arguments)
    return out.getvalue()
