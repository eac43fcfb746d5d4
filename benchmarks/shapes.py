"""Shapes of the features that the matching operators get in each case; `Case.shapes` says the same of the networks."""

from collections.abc import Sequence

Features = Sequence[tuple[int, ...]]  # (C, H, W) of each layer
MatchingShapes = tuple[int, Features, Features]  # batch, of the source layers, of the target layers; all pairs

_RESNET = [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
MATCHING_SHAPES: dict[str, MatchingShapes] = {
    "minute": (3, [(3, 4, 4), (8, 2, 2)], [(4, 4, 4), (16, 2, 2)]),
    "quick": (8, [(64, 28, 28), (256, 7, 7)], [(64, 28, 28), (512, 7, 7)]),  # every kind of layer
    "tiny": (
        25,
        [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
        [(16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4), (128, 2, 2)],
    ),
    "cifar": (
        128,
        [(16, 32, 32), (32, 16, 16), (64, 8, 8)],
        [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)],
    ),
    "imagenet": (64, _RESNET, _RESNET),
    "four-source": (64, _RESNET * 4, _RESNET),
}
