"""The state of an engine: saved, loaded, refused."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from l2t_fast import L2T, Engine, L2TError
from tests.engine.shared import (
    Tensors,
    assert_identical,
    case_id,
    resnet,
    small_batch,
    small_learner,
    small_net,
    snapshot,
    source_net,
    with_dropout,
)

pytestmark = pytest.mark.core


@pytest.mark.parametrize("net", [resnet, with_dropout], ids=case_id)
@pytest.mark.parametrize("options", [{}, {"what": "uniform", "where": "fixed"}, {"scheme": "simulation"}], ids=case_id)
def test_a_loaded_state_goes_on_bit_exactly(net: Any, options: dict[str, Any]) -> None:
    def fresh(seed: int) -> Engine:
        torch.manual_seed(seed)
        target, layers = net()
        learner = L2T(
            source_net((2, 2)), target, source_layers=["0", "1"], target_layers=layers, example=small_batch(0, 16)[0],
            **{k: v for k, v in options.items() if k != "scheme"},
        )  # fmt: skip
        return Engine(learner, meta_lr=1e-2, scheme=options.get("scheme", "transfer"))

    def go_on(engine: Engine) -> list[Tensors]:
        torch.manual_seed(7)
        return [engine.step(*small_batch(i, 16), val=small_batch(9, 16)) for i in (10, 11)]

    torch.manual_seed(5)
    first = fresh(1)
    source = copy.deepcopy(first.learner.sources)
    for seed in range(2):
        first.step(*small_batch(seed, 16), val=small_batch(9, 16))
    first.lr = 0.03
    state = copy.deepcopy(first.state_dict())
    kept = copy.deepcopy(state)
    expected = go_on(first)
    end = copy.deepcopy(first.state_dict())

    for seed in (2, 3):  # twice from the same state, so it is not changed by what follows
        other = fresh(seed)
        other.learner.sources.load_state_dict(source.state_dict())
        other.step(*small_batch(20, 16), val=small_batch(9, 16))
        other.load_state_dict(state)
        assert_identical(other.state_dict(), kept)
        assert_identical(go_on(other), expected)
        assert_identical(other.state_dict(), end)
        assert_identical(state, kept)


def test_a_state_passes_through_a_file(tmp_path: Any) -> None:
    engine = Engine(small_learner())
    engine.step(*small_batch(0, 8))
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    expected = copy.deepcopy(engine.state_dict())
    engine.step(*small_batch(1, 8))
    engine.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_identical(engine.state_dict(), expected)


def test_a_foreign_state_is_refused_and_nothing_changed() -> None:
    engine = Engine(small_learner())
    engine.step(*small_batch(0, 8))
    other = copy.deepcopy(engine.state_dict())
    engine.step(*small_batch(1, 8))

    wide = copy.deepcopy(other)
    wide["phi"]["where.3.weight"] = torch.zeros(1, 99)
    states: list[Any] = [
        {},
        [other],
        {"state_dict": {}},
        wide,
        *({k: v for k, v in other.items() if k != key} for key in other),
        *({**other, key: {}} for key in ("theta", "momentum", "buffers", "phi", "adam")),
        {**other, "theta": dict.fromkeys(other["theta"], 1.0)},
        {**other, "adam": {"state": {}, "param_groups": []}},
        Engine(small_learner(pairs="single")).state_dict(),
        Engine(small_learner(what="uniform")).state_dict(),
    ]
    before = snapshot(engine)
    for state in states:
        with pytest.raises(L2TError, match=r"this (state does not fit the learner|is not the state of an engine)"):
            engine.load_state_dict(state)
        assert_identical(snapshot(engine), before)
    with pytest.raises(L2TError, match=r"'where.3.weight' is \[1, 99\], not \[1, 6\]"):
        engine.load_state_dict(wide)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    engine = Engine(small_learner(small_net(nn.ReLU())))
    engine.step(*small_batch(0, 8))
    state = copy.deepcopy(engine.state_dict())
    before = copy.deepcopy(engine.state_dict()["theta"])
    engine_state = engine.state_dict()
    partial = [{i: {n: t for n, t in m.items() if n != name} for i, m in state["adam"]["state"].items()}
               for name in ("step", "exp_avg", "exp_avg_sq")]  # fmt: skip
    for wrong in (
        {"lr": "x"},
        {"adam": None},
        {"adam": {**state["adam"], "state": {99: {}}}},
        *({"adam": {**state["adam"], "state": moments}} for moments in partial),
    ):
        with pytest.raises(L2TError):
            engine.load_state_dict({**state, "theta": {n: p + 1 for n, p in before.items()}, **wrong})
        assert all(torch.equal(engine_state["theta"][name], p) for name, p in before.items())
        assert_identical(engine.state_dict()["adam"], state["adam"])
