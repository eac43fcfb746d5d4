"""Training over epochs: bit-exact resumption, checkpoints, what happens when things go wrong."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2t_fast import L2T, Engine, L2TError
from l2t_fast.data.images import WHOLE, LabelledBatch, Part, TensorSet
from l2t_fast.data.splits import Data
from l2t_fast.engine.iteration import Iteration
from l2t_fast.errors import Interrupted, ReadError
from l2t_fast.files import load_checkpoint, save_checkpoint
from l2t_fast.ranks import Ranks, together
from l2t_fast.training import fit as fit_module
from l2t_fast.training.fit import Schedule, evaluate, fit
from l2t_fast.training.log import read_metrics
from tests.engine.parts import in_processes


class Stop:
    """A watch that asks to stop after so many looks."""

    def __init__(self, after: float = math.inf) -> None:
        self.looks, self.after, self.resumed_at = 0, after, None

    def resumed(self, epoch: int, iteration: int) -> None:
        self.resumed_at = (epoch, iteration)

    def iteration(self, epoch: int, metrics: dict[str, Tensor]) -> None: ...

    def evaluating(self, part: str) -> None: ...

    def epoch(self, row: dict[str, Any]) -> None: ...

    def stop_asked(self) -> bool:
        self.looks += 1
        return self.looks > self.after


def images(count: int, seed: int, augment: bool) -> TensorSet:
    """Three classes of noisy stripes that a small network can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    stripes = (torch.arange(8)[:, None] * (1 + labels[:, None, None, None])) % 4 * 60
    noise = torch.randint(0, 60, (count, 3, 8, 8), generator=generator)
    return TensorSet(labels=labels, augment=augment, images=(stripes + noise).to(torch.uint8), flip=True)


DATA = Data(images(26, 0, True), images(12, 1, False), images(12, 2, False), num_classes=3, image_shape=(3, 8, 8))


def network(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.2),
        nn.Conv2d(4, 5, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, classes),
    )


def training(seed: int = 0, **settings: Any) -> tuple[Engine, nn.Module]:
    torch.manual_seed(7)
    source = network(4)  # not in the checkpoint: it never changes
    torch.manual_seed(seed)
    target = network(3)
    learner = L2T(source, target, source_layers=["2", "5"], target_layers=["2", "5"], example=torch.zeros(2, 3, 8, 8))
    return Engine(learner, meta_lr=1e-2, **settings), target


SCHEDULE = Schedule(epochs=3, batch_size=8, lr=0.05, seed=3)  # 4 iterations an epoch


def assert_same(ours: Any, theirs: Any) -> None:
    """Equality to the last bit, through dictionaries."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


# A look after each iteration and each evaluation batch: 5 an epoch, then 2 for the test set.
@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
@pytest.mark.parametrize("stops", [[2], [4], [5], [9, 1, 3], [15], [16]], ids=str)
def test_resume_is_exact_to_the_bit(tmp_path: Path, stops: list[int], scheme: str) -> None:
    engine, target = training(scheme=scheme)
    whole = fit(tmp_path / "whole", engine, target, DATA, SCHEDULE, Stop())
    for i, after in enumerate(stops):
        stopped, its_target = training(seed=i, scheme=scheme)  # where it resumes, the checkpoint overrides the seed
        with pytest.raises(Interrupted):
            fit(tmp_path / "parts", stopped, its_target, DATA, SCHEDULE, Stop(after))
    resumed, its_target = training(seed=99, scheme=scheme)
    watch = Stop()
    parts = fit(tmp_path / "parts", resumed, its_target, DATA, SCHEDULE, watch)

    assert watch.resumed_at is not None
    assert_same(engine.state_dict(), resumed.state_dict())
    assert_same({**whole, "seconds": 0}, {**parts, "seconds": 0})
    assert read_metrics(tmp_path / "whole/metrics.jsonl") == read_metrics(tmp_path / "parts/metrics.jsonl")


def test_resume_after_a_kill(tmp_path: Path) -> None:
    """A killed process leaves an older checkpoint, later metrics and perhaps half a line."""
    engine, target = training()
    whole = fit(tmp_path / "whole", engine, target, DATA, SCHEDULE, Stop())
    killed, its_target = training()
    with pytest.raises(Interrupted):
        fit(tmp_path / "killed", killed, its_target, DATA, SCHEDULE, Stop(6))
    metrics = tmp_path / "killed/metrics.jsonl"
    later = {"epoch": 1, "iteration": 3, "lr": 0.0, "loss": 7.0}
    metrics.write_text(metrics.read_text() + json.dumps(later) + '\n{"epoch": 1, "iter')
    resumed, its_target = training()
    assert (
        fit(tmp_path / "killed", resumed, its_target, DATA, SCHEDULE, Stop()).items()
        >= {"test_accuracy_last": whole["test_accuracy_last"]}.items()
    )
    assert read_metrics(metrics) == read_metrics(tmp_path / "whole/metrics.jsonl")


def test_evaluation_leaves_each_module_in_its_own_mode() -> None:
    frozen = network(3)
    frozen[1].eval()
    evaluate(frozen, DATA.val)
    assert [module for module in frozen.modules() if not module.training] == [frozen[1]]


def test_result_and_best_weights(tmp_path: Path) -> None:
    engine, target = training()
    result = fit(tmp_path, engine, target, DATA, SCHEDULE, Stop())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    epochs = [row for row in rows if "iteration" not in row]
    assert len(rows) - len(epochs) == result["iterations"] == 12
    assert [row["lr"] for row in epochs] == pytest.approx([0.05, 0.0375, 0.0125])
    accuracies = [row["val_accuracy"] for row in epochs]
    assert result["best_epoch"] == accuracies.index(max(accuracies))
    assert result["test_accuracy_last"] == evaluate(target, DATA.test)
    target.load_state_dict(load_checkpoint(tmp_path / "best.pt")["weights"])
    assert evaluate(target, DATA.val) == max(accuracies) == result["val_accuracy_best"]
    assert evaluate(target, DATA.test) == result["test_accuracy_best"]
    means = [row["loss"] for row in rows if row["epoch"] == 1 and "iteration" in row]
    assert epochs[1]["loss"] == pytest.approx(sum(means) / len(means))


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    engine, target = training()
    with pytest.raises(Interrupted):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(6))
    good = (tmp_path / "last.pt").read_bytes()

    class Spoil(Stop):
        def resumed(self, epoch: int, iteration: int) -> None:
            engine.learner.projections[1].weight.data.fill_(math.nan)

    with pytest.raises(
        L2TError, match=r"the matching loss of pairs \(0, 0, 1\).* is nan at epoch 1, iteration 2: .*last.pt"
    ):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Spoil())
    assert (tmp_path / "last.pt").read_bytes() == good


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The last step before a checkpoint may spoil θ with every loss still finite."""
    engine, target = training()
    with pytest.raises(Interrupted):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(2))

    class Spoil(Stop):
        def iteration(self, epoch: int, metrics: dict[str, Tensor]) -> None:
            target[8].bias.data.fill_(math.inf)

    with pytest.raises(L2TError, match=r"'target.8.bias' is not finite before epoch 0, iteration 4"):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Spoil())
    theta = load_checkpoint(tmp_path / "last.pt")["engine"]["theta"]
    assert all(p.isfinite().all() for p in theta.values())


@pytest.mark.parametrize("iteration", [0, 3])
def test_a_meta_gradient_that_is_not_finite_is_said(
    iteration: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam takes it over into φ: λ shows it in the next iteration, or φ itself before the checkpoint."""
    engine, target = training()
    seen: list[int] = []
    simulated = Iteration.meta_gradient

    def spoiled(*arguments: Any, **named: Any) -> Any:
        loss, gradients = simulated(*arguments, **named)
        seen.append(len(seen))
        return loss, [g * math.nan if seen[-1] == iteration else g for g in gradients]

    monkeypatch.setattr(Iteration, "meta_gradient", spoiled)
    words = (
        "λ is not finite at epoch 0, iteration 1: the meta-gradient" if iteration == 0 else "since the meta-gradient"
    )
    with pytest.raises(L2TError, match=words):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop())


@pytest.mark.parametrize("name", ["1.running_var", "0.weight"])
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, name: str) -> None:
    """Buffers are looked at as parameters are, and best.pt as last.pt."""
    engine, target = training()

    class Spoil(Stop):
        def evaluating(self, part: str) -> None:
            target.state_dict()[name].fill_(math.inf)

    with pytest.raises(L2TError, match=rf"'(target\.)?{name}' is not finite before epoch 0.*nothing was saved yet"):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Spoil())
    assert not list(tmp_path.glob("*.pt"))


def test_a_kill_between_metrics_and_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, target = training()
    fit(tmp_path / "whole", engine, target, DATA, SCHEDULE, Stop())
    killed, its_target = training()
    calls = []

    def die(path: Path, content: dict[str, Any]) -> None:
        calls.append(path)
        if path.name == "last.pt" and len(calls) > 3:
            raise KeyboardInterrupt
        save_checkpoint(path, content)

    monkeypatch.setattr(fit_module, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(fit_module, "save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", killed, its_target, DATA, SCHEDULE, Stop())
    monkeypatch.undo()
    resumed, its_target = training()
    fit(tmp_path / "killed", resumed, its_target, DATA, SCHEDULE, Stop())
    assert read_metrics(tmp_path / "killed/metrics.jsonl") == read_metrics(tmp_path / "whole/metrics.jsonl")


def test_checkpoints_are_written_together_and_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first epoch and at the end, however short the epochs; best.pt never ahead of last.pt by an epoch."""
    written: list[tuple[str, int]] = []

    def save(path: Path, content: dict[str, Any]) -> None:
        written.append((path.name, content["state"]["epoch"] if path.name == "last.pt" else content["epoch"]))
        save_checkpoint(path, content)

    monkeypatch.setattr(fit_module, "save_checkpoint", save)
    engine, target = training()
    result = fit(tmp_path, engine, target, DATA, SCHEDULE, Stop())
    best = [("best.pt", result["best_epoch"])] if result["best_epoch"] else []
    assert written == [("best.pt", 0), ("last.pt", 1), *best, ("last.pt", 3)]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    engine, target = training()
    with pytest.raises(Interrupted):
        fit(tmp_path, engine, target, DATA, SCHEDULE, Stop(3))
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    learner = L2T(network(4), other, source_layers=["2"], target_layers=["1"], example=torch.zeros(2, 3, 8, 8))
    with pytest.raises(L2TError, match="does not fit the learner"):
        fit(tmp_path, Engine(learner), other, DATA, SCHEDULE, Stop())


def test_too_few_images(tmp_path: Path) -> None:
    engine, target = training()
    one = Data(images(1, 0, True), DATA.val, DATA.test, 3, (3, 8, 8))
    with pytest.raises(L2TError, match="1 training images are too few"):
        fit(tmp_path, engine, target, one, SCHEDULE, Stop())


class Unreadable(TensorSet):
    """The third batch of rank 1 cannot be read."""

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[LabelledBatch]:
        for i, batch in enumerate(super().batches(batch_size, seed=seed, epoch=epoch, start=start, part=part)):
            if part.rank == 1 and i == 2:
                raise ReadError("image 5 is damaged.")
            yield batch


def _train_unreadable(rank: int, group: Any, folder: Path) -> None:
    fit_module.current = lambda: Ranks(rank, 2, group)  # type: ignore[attr-defined]
    engine, target = training(group=group, mode="eager")
    train = Unreadable(DATA.train.labels, True, DATA.train.images, True)  # type: ignore[attr-defined]
    with together(group):
        fit(folder, engine, target, dataclasses.replace(DATA, train=train), Schedule(2, 8, 0.05, 3), Stop())


@pytest.mark.slow
def test_an_image_that_one_rank_cannot_read_ends_all_at_once(tmp_path: Path) -> None:
    """Nothing is saved: the other rank is in the midst of an iteration."""
    other, own = in_processes(2, tmp_path, _train_unreadable, tmp_path / "run")
    assert own == ("raised", ("ReadError", "image 5 is damaged."))
    assert other == ("raised", ("RankError", "rank 1 has failed: image 5 is damaged."))
    assert not (tmp_path / "run/last.pt").exists()
