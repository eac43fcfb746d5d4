"""A small network with random weights, and what becomes of files of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from l2t_fast.errors import L2TError
from l2t_fast.networks.architectures import build_model
from l2t_fast.networks.weights import checkpoint_classes, load_weights


def small(num_classes: int = 4, width: float = 0.25) -> nn.Module:
    model = build_model("resnet8", num_classes, width)
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            value.copy_(torch.rand_like(value))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stored(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def beneath(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def loads(place: str | Path, expected: dict[str, Tensor]) -> None:
    """As resnet8 with 4 classes, the classes counted too."""
    assert checkpoint_classes(place, "resnet8", 0.25) == 4
    model = small()
    load_weights(model, place)
    assert same(weights(model), expected)


def refuses(place: str | Path, words: str, model: nn.Module | None = None) -> None:
    """In one line, with the model unchanged."""
    model = small() if model is None else model
    before = weights(model)
    with pytest.raises(L2TError, match=words) as caught:
        load_weights(model, place)
    assert "\n" not in str(caught.value)
    assert same(weights(model), before)
