"""`engine.optimizer`: torch's schedules drive the engine, and trainers save it."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from l2t_fast import Engine, L2TError
from tests.engine.shared import X, Y, assert_identical, flat, small_batch, small_learner

pytestmark = pytest.mark.core


def engine(**options: Any) -> Engine:
    learner = small_learner(pairs="single")
    groups = [{"params": learner.projections.parameters(), "lr": 0.02}] if options.pop("grouped", False) else []
    return Engine(learner, lr=0.1, inner_steps=1, groups=groups, say=lambda text: None, **options)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6, cycle_momentum=False),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.StepLR(o, 1)], milestones=[2]
    ),
}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_drives_the_engine_as_it_drives_torchs_sgd(name: str, grouped: bool) -> None:
    """The learning rates that a step takes are those that the schedule set; its state resumes, without a warning."""
    subject = engine(grouped=grouped)
    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    if grouped:
        plain.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.02})

    def rates(optimizer: Any) -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The epoch parameter")  # SequentialLR's own
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        ours, theirs = (SCHEDULES[name](o) for o in (subject.optimizer, plain))
        for i in range(4):
            subject.step(*small_batch(i, 8))
            plain.step()
            assert [group.lr.item() for group in subject.trained.update.groups] == rates(plain)
            arguments = [1.0 + i] if name == "ReduceLROnPlateau" else []
            ours.step(*arguments)
            theirs.step(*arguments)
            assert rates(subject.optimizer) == rates(plain)
            assert subject.lr == rates(plain)[0]
        other = engine(grouped=grouped)
        again = SCHEDULES[name](other.optimizer)
        other.optimizer.load_state_dict(copy.deepcopy(subject.optimizer.state_dict()))
        again.load_state_dict(copy.deepcopy(ours.state_dict()))
        for _ in range(2):
            for subject_, schedule in ((subject, ours), (other, again)):
                subject_.step(X, Y)
                schedule.step(*arguments)
    assert_identical(other.state_dict(), subject.state_dict())
    assert_identical([g.lr for g in other.trained.update.groups], [g.lr for g in subject.trained.update.groups])


def test_a_schedule_of_the_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(engine().optimizer, max_lr=0.2, total_steps=6)


def test_the_learning_rate_of_the_engine_is_that_of_the_groups_without_their_own() -> None:
    learner = small_learner(pairs="single")
    weight, other = list(learner.target.parameters())[:2]
    groups = [{"params": [weight], "weight_decay": 0.0}, {"params": [other], "lr": 0.02}]
    subject = Engine(learner, lr=0.1, groups=groups)
    subject.lr = 0.05
    assert [group["lr"] for group in subject.optimizer.param_groups] == [0.05, 0.05, 0.02]
    before = [p.clone() for p in (weight, other)]
    subject.lr, subject.optimizer.param_groups[2]["lr"] = 0.0, 0.0
    subject.step(X, Y)
    assert_identical([weight, other], before)


def test_a_step_with_a_closure_is_one_step() -> None:
    one, other = engine(), engine()
    counted: list[int] = []
    for subject in (one, other):
        subject.optimizer.register_step_post_hook(lambda *_: counted.append(1))
    metrics = one.optimizer.step(lambda: one.step(X, Y))
    assert_identical(metrics, other.step(X, Y))
    assert_identical(one.state_dict(), other.state_dict())
    assert len(counted) == 2
    before = copy.deepcopy(one.state_dict())
    assert one.optimizer.step() is None
    one.optimizer.zero_grad()
    assert_identical(one.state_dict(), before)


def test_its_state_is_the_engines() -> None:
    subject, other = engine(), engine()
    subject.step(X, Y)
    state = copy.deepcopy(subject.optimizer.state_dict())
    assert_identical(state["engine"], subject.state_dict())
    other.optimizer.load_state_dict(state)
    assert_identical(other.state_dict(), subject.state_dict())
    assert flat(other.state_dict()["momentum"]).norm() > 0
    for wrong in ({}, {"state": {}, "param_groups": state["param_groups"]}, {**state, "param_groups": []}):
        with pytest.raises(L2TError, match=r"this is not the state of an engine's optimizer"):
            other.optimizer.load_state_dict(wrong)


def test_what_an_engine_does_not_read_there_is_refused() -> None:
    subject = engine()
    with pytest.raises(L2TError, match=r"the groups of an engine are fixed"):
        subject.optimizer.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(L2TError, match=r"cannot be copied or pickled"):
        copy.deepcopy(subject.optimizer)
    subject.optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(L2TError, match=r"lr=nan is not to be had"):
        subject.step(X, Y)
    subject.optimizer.param_groups[0]["lr"] = 0.1
    subject.optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(L2TError, match=r"the weight_decay of an engine is fixed"):
        subject.step(X, Y)
