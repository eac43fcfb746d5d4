"""Checkpoints: what they are bound to, damaged ones, and none where there is no room."""

import math
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from l2t_fast import L2TError
from l2t_fast.errors import DamagedFileError, Interrupted, MachineError
from l2t_fast.files import load_checkpoint, save_checkpoint
from l2t_fast.training import fit as fit_module
from l2t_fast.training.fit import fit
from tests.training.test_fit import DATA, SCHEDULE, Stop, assert_same, training

MADE = {"--method": "at", "seed": "0", "--beta": "0.5", "images": "0a", "source weights": "0b"}


class Told(Stop):
    """A watch that notes what is said."""

    def __init__(self, after: float = math.inf) -> None:
        super().__init__(after)
        self.said = ""

    def say(self, text: str) -> None:
        self.said += text


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a training that saved after each epoch, and was stopped in the third."""
    monkeypatch.setattr(fit_module, "_SAVE_EVERY", 0.0)
    engine, target = training()
    with pytest.raises(Interrupted):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(12), MADE)
    return tmp_path


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["changed", "truncated", "missing", "not finite"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped: Path, tmp_path: Path, how: str) -> None:
    """With a sentence, and to the same end."""
    last = stopped / "last.pt"
    if how == "changed":
        changed(last)
    elif how == "truncated":
        last.write_bytes(last.read_bytes()[:1000])
    elif how == "missing":
        last.unlink()
    else:
        content = load_checkpoint(last)
        content["engine"]["theta"]["target.0.weight"][0, 0, 0, 0] = math.nan
        save_checkpoint(last, content)
    engine, target = training(seed=99)
    watch = Told()
    ours = fit(stopped, engine, target, DATA, SCHEDULE, watch, MADE)
    word = "missing" if how == "missing" else "damaged"
    assert watch.said == f"{last} is {word}: going on from the checkpoint before it\n"
    assert watch.resumed_at == (2, 0)
    whole, its_target = training()
    theirs = fit(tmp_path / "whole", whole, its_target, DATA, SCHEDULE, Stop(), MADE)
    assert_same(engine.state_dict(), whole.state_dict())
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_damaged_checkpoints_without_one_before_are_named(stopped: Path) -> None:
    changed(stopped / "last.pt")
    (stopped / "before.pt").write_bytes(b"")
    engine, target = training()
    with pytest.raises(DamagedFileError, match=r"before.pt is damaged .*: remove .*, to train that part anew"):
        fit(stopped, engine, target, DATA, SCHEDULE, Told(), MADE)


def test_weights_that_are_not_finite_are_not_tested(stopped: Path) -> None:
    """A network with one NaN still has an accuracy."""
    content = load_checkpoint(stopped / "best.pt")
    content["weights"]["0.weight"][0, 0, 0, 0] = math.nan
    engine, target = training()
    watch = Told()
    watch.evaluating = lambda part: part == "test" and save_checkpoint(stopped / "best.pt", content)  # type: ignore
    with pytest.raises(DamagedFileError, match=r"best.pt is damaged \('0.weight' is not finite\)"):
        fit(stopped, engine, target, DATA, SCHEDULE, watch, MADE)


def weights_with(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], Any]:
    def changed(content: dict[str, Any]) -> dict[str, Any]:
        return {**content, "weights": {**content["weights"], "0.weight": change(content["weights"]["0.weight"])}}

    return changed


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda content: {**content, "made": {**content["made"], "seed": "1"}}, "was made with seed 1, not 0"),
        (lambda content: {**content, "made": {**content["made"], "images": "0c"}}, "was made with other images"),
        (lambda content: {**content, "epoch": 77}, "is of epoch 77, and epoch 0 was best"),
        (lambda content: {"engine": content}, "is of something else"),
        (lambda content: {**content, "made": [1]}, "is of something else"),
        (weights_with(lambda w: w.transpose(2, 0)), "is of something else"),
        (weights_with(lambda w: w.half()), "is of something else"),
        (weights_with(lambda w: w.to(torch.complex64)), "is of something else"),
        (lambda content: {**content, "weights": {}}, "is of something else"),
    ],
)
def test_the_best_weights_are_bound_to_what_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[dict[str, Any]], Any], words: str
) -> None:
    """Those of another seed or epoch fit as well, and have another accuracy."""
    monkeypatch.setattr("l2t_fast.training.fit.evaluate", lambda *arguments: 0.5)  # so that epoch 0 is the best
    engine, target = training()
    fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(), MADE)
    save_checkpoint(tmp_path / "best.pt", edit(load_checkpoint(tmp_path / "best.pt")))
    engine, target = training()
    with pytest.raises(L2TError, match=rf"checkpoint .*best.pt {words}"):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(), MADE)


def test_best_weights_of_an_older_version_are_taken(stopped: Path) -> None:
    content = load_checkpoint(stopped / "best.pt")
    del content["made"]
    save_checkpoint(stopped / "best.pt", content)
    engine, target = training()
    fit(stopped, engine, target, DATA, SCHEDULE, Told(), {**MADE, "--optimizer": "sgd"})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"--method": "scratch"}, "was made with --method at, not scratch: put that back, or give another --name"),
        ({"seed": "1"}, "was made with seed 0, not 1"),
        ({"--beta": "0.1"}, "was made with --beta 0.5, not 0.1"),
        ({"images": "0c"}, "was made with other images"),
        ({"source weights": "0c"}, "was made with other source weights"),
    ],
)
def test_a_checkpoint_is_bound_to_what_made_it(stopped: Path, other: dict[str, str], words: str) -> None:
    engine, target = training()
    with pytest.raises(L2TError, match=words):
        fit(stopped, engine, target, DATA, SCHEDULE, Told(), {**MADE, **other})


@pytest.mark.parametrize(
    ("group", "changes", "words"),
    [
        ("state", {"epoch": "a"}, "last.pt is of something else: give one that `l2t-fast train` wrote"),
        ("state", {"epoch": 0.5}, "last.pt is of something else"),
        ("state", {"iteration": -5}, "last.pt is of something else"),
        ("state", {"seconds": math.inf}, "last.pt is of something else"),
        ("state", {"seconds": -1.0}, "last.pt is of something else"),
        ("state", {"best_epoch": -7}, "last.pt is of something else"),
        ("state", {"best_epoch": 50}, "last.pt is of something else"),
        ("state", {"best_accuracy": 5.0}, "last.pt is of something else"),
        ("state", {"epoch": 10**9}, "last.pt is of a longer training"),
        ("state", {"iteration": 10**9}, "last.pt is of a longer training"),
        ("random", {"cpu": torch.zeros(3, dtype=torch.uint8)}, "last.pt is of something else"),
        ("made", [1], "last.pt is of something else"),
        ("engine", None, "last.pt is of something else"),
        ("threads", "two", "last.pt is of something else"),
    ],
)
def test_an_edited_checkpoint_is_refused(stopped: Path, group: str, changes: Any, words: str) -> None:
    content = load_checkpoint(stopped / "last.pt")
    content[group] = {**content[group], **changes} if isinstance(changes, dict) else changes
    save_checkpoint(stopped / "last.pt", content)
    engine, target = training()
    with pytest.raises(L2TError, match=words):
        fit(stopped, engine, target, DATA, SCHEDULE, Told(), MADE)


def test_moments_that_are_not_finite_are_not_gone_on_from(stopped: Path) -> None:
    content = load_checkpoint(stopped / "last.pt")
    content["engine"]["adam"]["state"][0]["exp_avg"].fill_(math.nan)
    save_checkpoint(stopped / "last.pt", content)
    (stopped / "before.pt").unlink()
    engine, target = training()
    with pytest.raises(DamagedFileError, match=r"last.pt is damaged \('exp_avg' is not finite\)"):
        fit(stopped, engine, target, DATA, SCHEDULE, Told(), MADE)


@pytest.mark.parametrize(
    "change",
    [
        lambda moments: {0: "nothing"},
        lambda moments: {-1: moments[0]},
        lambda moments: {0: {**moments[0], "exp_avg": "x"}},
        lambda moments: {0: {**moments[0], "step": moments[0]["step"] - 100}},
        lambda moments: {0: {**moments[0], "exp_avg_sq": moments[0]["exp_avg_sq"] - 1}},
    ],
)
def test_moments_that_none_can_have_are_refused(stopped: Path, change: Callable[[Any], Any]) -> None:
    content = load_checkpoint(stopped / "last.pt")
    content["engine"]["adam"]["state"] = change(content["engine"]["adam"]["state"])
    save_checkpoint(stopped / "last.pt", content)
    engine, target = training()
    with pytest.raises(L2TError, match=r"last.pt: this state is not that of an engine: its 'adam'"):
        fit(stopped, engine, target, DATA, SCHEDULE, Told(), MADE)


def test_sparse_parameters_are_refused(stopped: Path) -> None:
    content = load_checkpoint(stopped / "last.pt")
    theta = content["engine"]["theta"]
    theta["target.0.weight"] = theta["target.0.weight"].to_sparse()
    save_checkpoint(stopped / "last.pt", content)
    (stopped / "before.pt").unlink()
    engine, target = training()
    with pytest.raises(DamagedFileError, match=r"last.pt is damaged \('target.0.weight' is torch.sparse_coo\)"):
        fit(stopped, engine, target, DATA, SCHEDULE, Told(), MADE)


def test_a_checkpoint_of_an_older_version_goes_on(stopped: Path) -> None:
    content = load_checkpoint(stopped / "last.pt")
    for key in ("made", "threads"):
        del content[key]
    save_checkpoint(stopped / "last.pt", content)
    engine, target = training()
    watch = Told()
    fit(stopped, engine, target, DATA, SCHEDULE, watch, MADE)
    assert watch.resumed_at == (2, 3)
    assert watch.said == ""


def test_another_number_of_threads_is_said(stopped: Path) -> None:
    content = load_checkpoint(stopped / "last.pt")
    save_checkpoint(stopped / "last.pt", {**content, "threads": torch.get_num_threads() + 1})
    engine, target = training()
    watch = Told()
    fit(stopped, engine, target, DATA, SCHEDULE, watch, MADE)
    assert f"was made with {torch.get_num_threads() + 1} CPU threads" in watch.said
    assert "does not go on to the bit" in watch.said


def test_room_for_checkpoints_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    engine, target = training()
    with pytest.raises(MachineError, match=r"take [\d,]+ bytes, and there is room for 100: make room, or give another"):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop())
    assert not list(tmp_path.iterdir())


class Malicious:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused_unexecuted(stopped: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    torch.save({"format": "l2t_fast.checkpoint.1", "engine": Malicious(trap)}, stopped / "last.pt")
    (stopped / "before.pt").unlink()
    engine, target = training()
    with pytest.raises(DamagedFileError, match=r"last.pt is damaged or not a checkpoint"):
        fit(stopped, engine, target, DATA, SCHEDULE, Told(), MADE)
    assert not trap.exists()
