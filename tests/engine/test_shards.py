"""Parts of a batch, on several ranks and one after the other, against one process on the joined batch; in float64."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2t_fast import AdamW, Engine, L2TError
from l2t_fast.engine.counts import count
from tests.engine.parts import Case, in_processes, run_all, squares
from tests.engine.shared import CLASSES, Tensors, assert_close, case_id

pytestmark = pytest.mark.core

UNEVEN = [[4], [3]]
SIMULATION = {"scheme": "simulation", "memory": "recompute", "nesterov": True}
ADAMW = {"optimizer": AdamW(eps=1e-3, weight_decay=0.1), "max_grad_norm": 0.1, "lr": 1e-2}
CASES = [
    Case("none", UNEVEN),
    Case("batch", UNEVEN),
    Case("sync", UNEVEN),
    Case("sync", UNEVEN, {"memory": "recompute", "inner_steps": 1}),
    Case("batch", [[3, 2], [2, 2]], SIMULATION),
    Case("sync", UNEVEN, SIMULATION),
    Case("none", UNEVEN, ADAMW, grouped=True),
    Case("batch", [[3, 2], [2, 2]], {"scheme": "simulation", **ADAMW}),
    Case("none", UNEVEN, {"loss": squares}),
]


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[Tensors], list[tuple[str, str]]]]:
    """Of each rank, what `run_all` gave; processes take long to start."""
    outcomes = in_processes(2, tmp_path_factory.mktemp("ranks"), run_all, CASES)
    assert [kind for kind, _ in outcomes] == ["gave", "gave"], outcomes
    return [found for _, found in outcomes]


def equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.double().norm() > 1e-9:
            assert_close({name: found[name].double()}, {name: value.double()})
        else:  # of a bias before a BatchNorm: rounding
            assert found[name].double().norm() < 1e-8, name


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i].norm}-{'-'.join(CASES[i].options)}")
def test_two_ranks_equal_one_process(i: int, of_two_ranks: list[tuple[list[Tensors], Any]]) -> None:
    """Metrics of several steps, parameters, momentum, buffers, Adam's moments, a meta-gradient."""
    wanted = CASES[i].run(None)
    assert wanted["gradient of what.0.weight"].norm() > 1e-9
    assert ("accuracy of step 0" in wanted) is (CASES[i].options.get("loss") is not squares)
    for found, _ in of_two_ranks:
        equal(found[i], wanted)


def test_ranks_with_other_settings_are_refused(of_two_ranks: list[tuple[Any, list[tuple[str, str]]]]) -> None:
    for _, ((name, sentence), _) in of_two_ranks:
        assert name == "L2TError"
        assert "make them alike on all ranks" in sentence


def test_one_rank_that_fails_ends_all_with_its_sentence(
    of_two_ranks: list[tuple[Any, list[tuple[str, str]]]],
) -> None:
    (_, (_, other)), (_, (_, own)) = of_two_ranks
    assert own[0] == "L2TError"
    assert own[1].startswith("the labels go from")
    assert other == ("RankError", f"rank 1 has failed: {own[1]}")


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "batch", "sync"])
def test_four_ranks_equal_one_process(norm: str, tmp_path: Path) -> None:
    case = Case(norm, [[3], [2], [4], [2]])
    wanted = case.run(None)
    for kind, found in in_processes(4, tmp_path, run_all, [case]):
        assert kind == "gave", found
        equal(found[0][0], wanted)


@pytest.mark.parametrize("options", [{}, {"scheme": "simulation"}, {"memory": "recompute"}], ids=case_id)
@pytest.mark.parametrize("sizes", [[2, 2], [3, 2, 2]], ids=str)
def test_micro_batches_equal_one_process_that_groups_them(sizes: list[int], options: dict[str, Any]) -> None:
    case = Case("batch", [sizes], options)
    equal(case.run(None, accumulate=len(sizes)), case.run(None))


@pytest.mark.parametrize("scheme", ["transfer", "simulation"])
def test_clipping_and_adamw_act_on_the_sum_over_micro_batches(scheme: str) -> None:
    case = Case("batch", [[3, 2]], {"scheme": scheme, **ADAMW}, grouped=True)
    equal(case.run(None, accumulate=2), case.run(None))


@pytest.mark.parametrize("loss", [squares, nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["squares", "smooth"])
def test_there_is_accuracy_where_the_loss_has_it(loss: Any) -> None:
    case = Case("none", [[3, 2]], {"loss": loss})
    found = case.run(None, accumulate=2)
    assert ("accuracy of step 0" in found) is (loss is not squares)
    equal(found, case.run(None))


CLASS_WEIGHTS = torch.linspace(1, 2, CLASSES, dtype=torch.float64)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
        functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda outputs, y: F.cross_entropy(outputs, y, weight=CLASS_WEIGHTS),
        lambda outputs, y: F.cross_entropy(outputs, y, ignore_index=1),
        lambda outputs, y: (outputs @ outputs.T).exp().mean().log(),
    ],
    ids=["weight", "partial", "sum", "weighted function", "ignoring function", "of pairs"],
)
def test_a_loss_that_is_no_mean_over_images_is_refused_for_parts(loss: Any) -> None:
    case = Case("none", [[3, 2]], {"loss": loss})
    x, y = case.batch(0)
    y[:] = torch.tensor([1, 0, 2, 1, 1])
    whole, parts = (Engine(case.learner(joined=False), loss=loss, accumulate=K, say=lambda text: None) for K in (1, 2))
    whole.step(x, y)
    with pytest.raises(L2TError, match="not the mean over its images, as accumulate= and group= need it"):
        parts.step(x, y)


def test_ignored_labels_are_refused_for_parts_in_any_step() -> None:
    case = Case("none", [[3, 2]])
    engine = Engine(case.learner(joined=False), loss=nn.CrossEntropyLoss(), accumulate=2, say=lambda text: None)
    x, y = case.batch(0)
    engine.step(x, y)
    y[0] = -100
    with pytest.raises(L2TError, match="labels of -100 are ignored"):
        engine.step(x, y)


def test_micro_batches_without_meta_networks() -> None:
    """A target that learns from its labels alone: the real step is all that there is."""
    case = Case("batch", [[3, 2]])
    wanted, found = (case.learner(joined=joined) for joined in (True, False))
    for learner, K in ((wanted, 1), (found, 2)):
        learner.what.requires_grad_(False)
        learner.where.requires_grad_(False)
        Engine(learner, accumulate=K, say=lambda text: None).step(*case.batch(0))
    equal(dict(found.target.state_dict()), dict(wanted.target.state_dict()))


def test_micro_batches_take_the_memory_of_one() -> None:
    """But for the sources' features, which are kept of the whole batch."""
    peaks = {}
    for images, K in ((24, 1), (24, 6), (4, 1)):
        case = Case("batch", [[images]], side=32)
        engine = Engine(case.learner(joined=False), accumulate=K, memory="recompute", say=lambda text: None)
        x, y = case.batch(0)
        engine.step(x, y)
        peaks[images, K] = count(functools.partial(engine.step, x, y)).peak_bytes
    kept = 20 * (5 * 16**2 + 6 * 8**2) * 8  # features of the other micro-batches
    views = 24 * 3 * 32**2 * 8  # of the images, which the counter takes for new
    assert peaks[24, 6] - views < 1.1 * peaks[4, 1] + kept < 0.5 * peaks[24, 1], peaks


def test_a_batch_that_makes_no_micro_batches_is_refused() -> None:
    case = Case("batch", [[2, 2]])
    engine = Engine(case.learner(joined=False), accumulate=3, say=lambda text: None)
    assert engine.smallest_batch == 6
    with pytest.raises(L2TError, match="too small for accumulate=3: give 6 images or more"):
        engine.step(*case.batch(0))


def test_sync_batch_norm_is_batch_norm_where_there_is_no_group() -> None:
    found, wanted = Case("sync", [[4]]), Case("batch", [[4]])
    equal(found.run(None, accumulate=1), wanted.run(None, accumulate=1))
    learner = found.learner(joined=False)
    assert not any("forward" in m.__dict__ for m in learner.target.modules())
    assert any(type(m) is nn.SyncBatchNorm for m in learner.target.modules())
    assert torch.isfinite(learner.matching_loss(found.batch(0)[0]))
