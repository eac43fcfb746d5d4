"""The Gram form of the matching operators: the same numbers as the direct one, in better digits where it is taken."""

from typing import Any

import pytest
import torch

from l2t_fast.engine import counts
from l2t_fast.kernels.matching import aten, gram
from tests.engine.shared import assert_close, beside_the_reference, small_batch, vgg
from tests.kernels.shared import SHAPES, flat, random_inputs

pytestmark = pytest.mark.core

# Much area, few target channels: ([C_s, h, w]..., [C_t, H, W], pairs).
WIDE = ([(40, 4, 4), (24, 8, 8)], [(4, 32, 32)], [(0, 0), (1, 0)])


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer in the Gram form, float64 in itself: rounding hides nothing."""
    monkeypatch.setattr(gram, "pays", lambda target, sources: True)
    monkeypatch.setattr(gram, "WIDER", {**gram.WIDER, torch.float64: torch.float64})


def results(inputs: tuple, directions: tuple) -> list[torch.Tensor]:
    """Of all operators."""
    targets, sources, r, bias, a, *indices = inputs
    found = [aten.matching_distances(targets, sources, r, bias, *indices)]
    for distances in (False, True):
        found += aten.matching_gradient(targets, sources, r, bias, a, *indices, distances)
    for primal in (False, True):
        found += aten.matching_adjoint(targets, sources, r, bias, a, *directions, *indices, primal)
    return list(flat(found))


@pytest.mark.parametrize("shapes", [*SHAPES.values(), WIDE], ids=[*SHAPES, "wide"])
def test_it_is_the_direct_form(shapes: Any, request: pytest.FixtureRequest) -> None:
    inputs = random_inputs(*shapes)
    u_targets, _, u_r, u_bias, *_ = random_inputs(*shapes, seed=1)
    direct = results(inputs, (u_targets, u_r, u_bias))
    request.getfixturevalue("always")
    ours = results(inputs, (u_targets, u_r, u_bias))
    assert len(ours) == len(direct)
    for x, y in zip(ours, direct, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
        assert x.stride() == y.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [1.0, 1e-2])
def test_its_digits(dtype: torch.dtype, small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where d is small beside r T; what it gives has the dtypes of the direct form."""
    targets, sources, r, bias, a, *indices = random_inputs(*WIDE)
    mean = targets[0].mean((2, 3), keepdim=True) + 1.0
    near = [small * S + torch.nn.functional.conv2d(mean, r[p], bias[p]) for p, S in enumerate(sources)]
    u_targets, _, u_r, u_bias, *_ = random_inputs(*WIDE, seed=1)
    features = [[mean + small * targets[0]], near, u_targets]
    features = [[x.to(dtype) for x in group] for group in features]
    rest = [[x.float() for x in group] for group in (r, bias, a, u_r, u_bias)]

    def found(features: list, rest: list) -> list[torch.Tensor]:
        (T, S, u_T), (r, bias, a, u_r, u_bias) = features, rest
        return results((T, S, r, bias, a, *indices), (u_T, u_r, u_bias))

    assert gram.pays(features[0][0].shape, [S.shape for S in near])
    ours = found(features, rest)
    exact = found(*([[x.double() for x in group] for group in groups] for groups in (features, rest)))
    monkeypatch.setattr(gram, "pays", lambda target, sources: False)
    direct = found(features, rest)
    for mine, theirs, right in zip(ours, direct, exact, strict=True):
        assert mine.dtype == theirs.dtype
        # A sum in float32, rounded once: half a unit in the last place of the dtype is what nothing can avoid.
        least = torch.finfo(mine.dtype).eps * right.norm()
        assert (mine - right).norm() <= max(1.2 * (theirs - right).norm(), least)


def test_where_it_pays() -> None:
    shape = (4, 64, 56, 56)
    sources = [(4, 64, 56, 56), (4, 128, 28, 28), (4, 256, 14, 14), (4, 512, 7, 7)]
    assert gram.direct_flops(shape, sources) == 3 * 2 * 4 * 960 * 64 * 56**2
    assert gram.pays(shape, sources)
    assert not gram.pays((4, 512, 7, 7), sources)
    T = torch.zeros(1, 1, 2, 2)
    assert gram.serves(T)
    assert gram.serves(T.bfloat16())
    assert not gram.serves(T.double())
    assert not gram.serves(T.to("meta"))


def test_flops_are_those_of_its_products() -> None:
    targets, sources, r, bias, a, *indices = random_inputs(*WIDE)
    inputs = [[x.float() for x in group] for group in (targets, sources, r, bias, a)]
    counted = counts.count(lambda: aten.matching_gradient(*inputs, *indices, False)).flops
    ones = (5 / 4) ** 2  # the row of ones under the 4 of T, which the formula leaves out
    shapes = targets[0].shape, [S.shape for S in sources]
    assert gram.flops(*shapes) <= counted <= ones * gram.flops(*shapes)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_the_engine_equals_the_reference(memory: Any) -> None:
    """Source features reach the operators at their own resolution."""
    torch.manual_seed(0)
    engine, reference = beside_the_reference(*vgg(), memory=memory, inner_steps=2, size=32)
    x, y = small_batch(30, 32)
    learner = engine.learner
    S = learner.source_features(x)
    read, of_pairs = learner.matching_sources(S, learner.resizes(x))
    assert [read[i].data_ptr() for i in of_pairs] == [S[m].data_ptr() for m in learner.source_of]
    assert_close(engine.meta_gradient(x, y), reference.meta_gradient(x, y))
