"""Each example runs as it is, and does what it is there to show."""

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python examples/NAME.py` finds `digits.py`; the source is trained once, and little."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    if "digits" not in sys.modules:
        import digits  # type: ignore[import-not-found]

        digits.trained_source = functools.cache(functools.partial(digits.trained_source, epochs=1))


def run(name: str, **arguments: Any) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**arguments)


def test_every_example_has_a_test() -> None:
    tested = {"digits", "plain", "dict_batches", "soft_labels", "with_lightning", "with_accelerate"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("name", ["plain", "dict_batches", "soft_labels"])
def test_it_learns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, epochs=2) > 0.4  # of five classes
    assert capsys.readouterr().out.count("epoch") == 2


def test_lightning_counts_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    straight = run("with_lightning", epochs=2, folder=tmp_path)
    steps = len(straight.train_dataloader)
    assert straight.global_step == 2 * steps
    (first,) = tmp_path.glob(f"*step={steps}.ckpt")
    (state,) = torch.load(first, weights_only=True)["optimizer_states"]
    assert max(v.abs().max() for v in state["engine"]["momentum"].values()) > 0
    resumed = run("with_lightning", epochs=2, folder=tmp_path, resume=first)
    assert resumed.global_step == 2 * steps
    theirs, ours = (trainer.lightning_module.engine.state_dict() for trainer in (straight, resumed))
    assert ours["lr"] == pytest.approx(theirs["lr"])
    assert ours["adam"]["state"][0]["step"] == theirs["adam"]["state"][0]["step"] == 2 * steps


def test_accelerate_prepares_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    engine = run("with_accelerate", epochs=1, folder=tmp_path)
    assert engine.lr == pytest.approx(0, abs=1e-9)  # the schedule has come to its end
    saved = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    torch.testing.assert_close(saved["engine"], engine.state_dict(), rtol=0, atol=0)
