"""TensorBoard event files, read back."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from l2t_fast.errors import Interrupted
from l2t_fast.kernels.matching.aten import resize
from l2t_fast.runs import tensorboard
from l2t_fast.runs.tensorboard import ToTensorBoard, matched_features
from l2t_fast.training.fit import fit
from l2t_fast.training.log import read_metrics
from tests.runs.commands import refused
from tests.training.test_fit import DATA, SCHEDULE, Stop, assert_same, training


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def scalars(found: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_scalars_and_pictures_come_back_and_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(tensorboard, "_PICTURES", 1)
    engine, target = training()
    fit(tmp_path / "alone", engine, target, DATA, SCHEDULE, Stop())
    watched, its_target = training()
    told = [ToTensorBoard()]
    fit(tmp_path / "run", watched, its_target, DATA, SCHEDULE, Stop(), {"--lr": "0.05"}, told, "l2t-ww, seed 0")
    assert_same(watched.state_dict(), engine.state_dict())  # dropout's random numbers too
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert rows == read_metrics(tmp_path / "alone/metrics.jsonl")

    found = events(tmp_path / "run")
    iterations = [row for row in rows if "iteration" in row]
    epochs = [row for row in rows if "iteration" not in row]
    losses = [(4 * row["epoch"] + row["iteration"], pytest.approx(row["loss"])) for row in iterations]
    assert scalars(found, "iteration/loss") == losses
    weights = [(4 * row["epoch"] + 3, pytest.approx(row["pair_weights"][1])) for row in epochs]
    assert scalars(found, "epoch/pair_weights/2_to_5") == weights
    assert [step for step, _ in scalars(found, "epoch/val_accuracy")] == [3, 7, 11]
    assert "| --lr | 0.05 |" in found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    for tag in ("pair_weights", "matched_features"):
        pictures = found.Images(tag)
        assert [picture.step for picture in pictures] == [11]
        with Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as picture:
            assert min(picture.size) > 150
            assert len(picture.convert("L").getcolors()) > 20


def test_what_a_killed_run_told_of_later_steps_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(ToTensorBoard, "_draw", lambda self, step: None)
    for after in (6, 10**9):
        engine, target = training()
        if after == 6:
            with pytest.raises(Interrupted):
                fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(after), callbacks=[ToTensorBoard()])
            # It had gone on, when it was killed, without another checkpoint.
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(tmp_path / "tensorboard")) as later:
                later.add_scalar("iteration/loss", 99.0, 6)
            continue
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(after), callbacks=[ToTensorBoard()])
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "iteration" in row]
    expected = [(4 * row["epoch"] + row["iteration"], pytest.approx(row["loss"])) for row in rows]
    assert scalars(events(tmp_path), "iteration/loss") == expected


def test_the_features_are_those_that_the_pair_matches() -> None:
    engine, target = training()
    learner = engine.learner
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    learner.what[1].bias.data[3] = 2.0  # channel 3 of pair (0, 0, 1) has most of the weight
    source, projected, channels = matched_features(learner, 1, x)
    assert channels[0] == 3
    with torch.no_grad():
        theirs, ours = learner.sources[0][:3](x), target.eval()[:6](x)
        assert torch.equal(source[:, 0], resize(theirs, (4, 4))[:, 3])
        assert torch.equal(projected[:, 0], learner.projections[1](ours)[:, 3])


def test_without_tensorboard_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *more: None if name == "tensorboard" else find(name, *more)  # noqa: E731
    monkeypatch.setattr("l2t_fast.runs.tensorboard.find_spec", hidden)
    error = refused(capsys, "--runs", str(tmp_path), "--log", "csv", "tensorboard", command="train")
    assert error == "--log tensorboard needs TensorBoard: pip install 'l2t-fast[tensorboard]'."
    assert not list(tmp_path.iterdir())
