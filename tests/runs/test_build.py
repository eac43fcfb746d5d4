"""Networks, learners and engines of the settings of a run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2t_fast import SGD, Engine
from l2t_fast.learner.learner import L2T
from l2t_fast.reference import Reference
from l2t_fast.runs.build import make_engine, source_folders
from l2t_fast.settings.columns import column_configs
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import OptimConfig, TableConfig, TrainConfig
from tests.engine.shared import X, assert_close, flat, randomise, small_batch, small_net, source_net


def test_where_the_sources_of_a_column_are() -> None:
    (config,) = column_configs(TableConfig(dataset=("cifar100",))).values()
    assert source_folders(config, Path("x")) == [Path("x/source")]


def engine_of(config: TrainConfig) -> tuple[Engine, nn.Module, nn.Module, dict[str, Any]]:
    """The engine of a run, and copies of the networks that it started from."""
    torch.manual_seed(0)
    source, target = source_net((2, 2)), small_net(nn.Softplus())
    networks: dict[str, Any] = {"source_layers": ["0", "1"], "target_layers": ["0", "2"], "example": X}
    learner = L2T(source, copy.deepcopy(target), **networks)
    randomise(learner)
    return make_engine(config, learner, lambda text: None), copy.deepcopy(source), target, networks


@pytest.mark.parametrize("lr", [None, 5e-3])
def test_optimizer_clipping_and_label_smoothing_of_a_run_equal_the_reference(lr: float | None) -> None:
    """In the real step, the simulated ones and L_meta; in float64."""
    optim = OptimConfig(lr=lr, optimizer="adamw", max_grad_norm=0.5, label_smoothing=0.2, meta_lr=1e-3)
    engine, source, target, networks = engine_of(resolve(TrainConfig(optim=optim)))
    assert engine.lr == (lr or 1e-3)

    def reference_of(norm: float | None, smoothing: float) -> Reference:
        loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        made = Reference(
            copy.deepcopy(source),
            copy.deepcopy(target),
            **networks,
            pairs=engine.learner.pairs,
            meta_lr=1e-3,
            loss=loss,
            max_grad_norm=norm,
            optimizer=lambda theta: torch.optim.AdamW(theta.values(), engine.lr, weight_decay=1e-2),
        )
        state = engine.state_dict()
        with torch.no_grad():
            for ours, theirs in ((made.theta, state["theta"]), (made.phi, state["phi"])):
                for name, p in ours.items():
                    p.copy_(theirs[name])
        return made

    reference = reference_of(0.5, 0.2)
    others = [reference_of(None, 0.2), reference_of(0.5, 0.0)]
    gradient = engine.meta_gradient(*small_batch(0, 8))
    for other in others:  # neither of the two is without effect here
        assert (flat(gradient) - flat(other.meta_gradient(*small_batch(0, 8)))).norm() > 1e-3 * flat(gradient).norm()
    for seed in range(3):
        x, y = small_batch(seed, 8)
        assert_close(engine.meta_gradient(x, y), reference.meta_gradient(x, y), 1e-9)
        expected, metrics = reference.step(x, y), engine.step(x, y)
        assert_close({k: metrics[k] for k in expected}, expected, 1e-9)
    state = engine.state_dict()
    assert_close(state["theta"], {k: p.detach() for k, p in reference.theta.items()}, 1e-9)
    assert_close(state["phi"], {k: p.detach() for k, p in reference.phi.items()}, 1e-9)


def test_without_a_word_it_is_sgd_on_the_plain_cross_entropy() -> None:
    engine, *_ = engine_of(resolve(TrainConfig()))
    assert engine.loss is F.cross_entropy
    assert engine.trained.update.rule == SGD(0.9, 1e-4, nesterov=False)
    assert engine.trained.update.max_norm is None
