"""Pair weights that relu6 holds at an end, and that a gradient can bring back."""

import pytest
import torch
from torch import Tensor

from l2t_fast import Engine
from l2t_fast.learner.weights import pair_weights, where_head
from tests.engine.shared import Tensors, X, Y, small_batch, small_learner

pytestmark = pytest.mark.core


def at(where: str, z: float) -> Engine:
    """An engine in which g(x) = z for every pair and image, some steps after the start."""
    engine = Engine(small_learner(where="relu"), meta_lr=0.0, mode="eager")
    for seed in range(3):
        engine.step(*small_batch(seed, 8))
    found = Engine(small_learner(where=where), mode="eager")
    for mine, theirs in zip(found.learner.parameters(), engine.learner.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    with torch.no_grad():
        for head in found.learner.where:
            head.weight.zero_()
            head.bias.fill_(z)
    return found


def per_image(engine: Engine, gradient: Tensors) -> list[tuple[Tensor, Tensor]]:
    """Of each pair (pooled source features [B, C_s], dL_meta/dg of each image [B]): their product is g's gradient."""
    S = [feature.mean((2, 3)) for feature in engine.learner.source_features(X)]
    pooled = [S[m] for m in engine.learner.source_of]
    return [
        (rows, torch.linalg.lstsq(rows.T, gradient[f"where.{p}.weight"].T).solution[:, 0])
        for p, rows in enumerate(pooled)
    ]


@pytest.mark.parametrize(("end", "inside"), [(6.0, 6.0), (9.0, 6.0), (0.0, 1e-11), (-2.0, 1e-11)])
def test_at_an_end_the_gradient_is_that_of_the_images_it_leads_inwards(end: float, inside: float) -> None:
    free = at("relu", inside)  # λ is the same, and every image's gradient passes
    gradient = free.meta_gradient(X, Y)
    held, inward = (at(where, end).meta_gradient(X, Y) for where in ("relu6", "relu6-inward"))
    some = 0
    for p, (pooled, v) in enumerate(per_image(free, gradient)):
        torch.testing.assert_close(pooled.T @ v, gradient[f"where.{p}.weight"][0], rtol=1e-6, atol=1e-12)
        wanted = v.clamp(min=0) if end >= 6 else v.clamp(max=0)  # descent makes λ smaller, or larger
        some += int((wanted != 0).sum())
        torch.testing.assert_close(inward[f"where.{p}.weight"][0], pooled.T @ wanted, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(inward[f"where.{p}.bias"][0], wanted.sum(), rtol=1e-6, atol=1e-9)
        assert held[f"where.{p}.weight"].count_nonzero() == 0
    assert some
    for name in held:
        if name.startswith("what"):
            torch.testing.assert_close(inward[name], held[name], rtol=0, atol=0)


def test_between_the_ends_it_is_relu6() -> None:
    one, other = (at(where, 2.5).meta_gradient(X, Y) for where in ("relu6", "relu6-inward"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_values_are_those_of_relu6_and_a_compiler_takes_it() -> None:
    torch.manual_seed(0)
    heads = torch.nn.ModuleList([where_head("relu6-inward", 5), where_head("relu6-inward", 5)]).double()
    pooled = 20 * torch.randn(64, 5, dtype=torch.float64)

    def weights(where: str) -> Tensor:
        return pair_weights(where, heads, [0, 1], pooled)

    lam = weights("relu6-inward")
    assert (lam.min(), lam.max()) == (0, 6)
    assert torch.equal(lam, weights("relu6"))
    compiled = torch.compile(weights, backend="aot_eager", fullgraph=True)
    ours, theirs = (
        torch.autograd.grad(made.cos().sum(), list(heads.parameters())) for made in (lam, compiled("relu6-inward"))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
