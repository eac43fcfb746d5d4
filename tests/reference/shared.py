"""Tiny networks in float64 and a reference made of them."""

from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.reference import Reference

CLASSES, SIZE, BATCH = 3, 8, 5
Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
# The target's features are of 4² and 2², those of the first source of 8² and 4²: resized down, or equal.
PAIRS = [(0, 0, 0), (0, 1, 0), (0, 1, 1)]
SECOND = [(1, 0, 0), (1, 0, 1)]  # the second source has one feature of 2²: resized up, or equal


def block(c_in: int, c_out: int, smooth: bool, stride: int = 1) -> nn.Sequential:
    act = nn.Softplus() if smooth else nn.ReLU(inplace=True)
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), act)


def source_net(strides: tuple[int, ...], smooth: bool = False) -> nn.Sequential:
    widths = [3, 4, 5]
    return nn.Sequential(*(block(widths[i], widths[i + 1], smooth, s) for i, s in enumerate(strides)))


def target_net(smooth: bool = False, dropout: bool = False) -> nn.Sequential:
    pool = nn.AvgPool2d if smooth else nn.MaxPool2d
    middle = nn.Dropout(0.3) if dropout else nn.Tanh() if smooth else nn.Identity()
    first, second = block(3, 6, smooth), block(6, 4, smooth)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    return nn.Sequential(pool(2), first, middle, pool(2), second, head)


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def build(*, two_sources: bool = False, smooth: bool = False, dropout: bool = False, **options: Any) -> Reference:
    """A reference in float64 with random what and where networks, two iterations after initialisation."""
    torch.manual_seed(0)
    sources = [source_net((1, 2), smooth)] + [source_net((4,), smooth)] * two_sources
    options.setdefault("pairs", PAIRS + SECOND * two_sources)
    reference = Reference(
        [s.double() for s in sources],
        target_net(smooth, dropout).double(),
        source_layers=[["0", "1"], ["0"]][: len(sources)],
        target_layers=["1", "4"],
        example=batch(0)[0],
        weight_decay=1e-2,
        **options,
    )
    with torch.no_grad():
        for p in reference.phi.values():
            p.add_(0.3 * torch.randn_like(p))
        for head, level in zip(reference.where, (6.0, 0.0), strict=False):
            if isinstance(head, nn.Linear):
                head.bias.fill_(level)  # relu6 clips some images of the first two pairs above, or below
    for seed in (10, 11):
        reference.step(*batch(seed), val=batch(20))
    return reference


def flat(tensors: Params) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def assert_close(a: Params, b: Params, relative: float) -> None:
    """Every tensor within `relative` of the other in norm, measured by its own norm."""
    assert a.keys() == b.keys()
    for k in a:
        assert (a[k] - b[k]).norm() <= relative * b[k].norm(), k


def assert_equal_state(a: dict[str, Params], b: dict[str, Params]) -> None:
    for part in a:
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), f"{part}.{name}"
