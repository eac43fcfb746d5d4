"""Users' BatchNorms that wait for what follows, as on a GPU: what the engine trains is what the oracle trains."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.engine.users import assert_same_training, ways
from tests.kernels.interpreted import on_triton

pytestmark = [
    pytest.mark.core,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py has the GPU's own"),
]


class Block(nn.Module):
    """A residual block that adds in place, and ends in a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.d, self.m = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.n(self.c(x)))
        out = self.m(self.d(out))
        out += x
        return self.relu(out)


class Listening(nn.Module):
    """Keeps what its BatchNorm returned, and shows it to the next pass."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.BatchNorm2d(4)
        self.last = torch.zeros(1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        out = F.relu(y) + self.last.mean()
        self.last = y.detach()[:1]
        return out


def hooked_bias() -> nn.Module:
    """A hook on a bias in front of a BatchNorm, whose gradient is zero but for what the hook makes of it."""
    block = Block()
    block.c.bias.register_hook(lambda g: g + 0.3)
    return block


class Doubled(nn.Module):
    """A bias in front of a BatchNorm that is used by a second layer too, where its gradient is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.d = nn.Conv2d(4, 4, 1)
        self.d.bias = self.c.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.d(F.relu(self.n(self.c(x)))))


def evaluating() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4).eval(), nn.ReLU())


def network(middle: nn.Module) -> nn.Sequential:
    """Images [B, 3, 10, 10]; a strided convolution, for fewer elements to interpret."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.BatchNorm2d(4), nn.ReLU(), middle, *head).double()


@ways([Block, Listening, evaluating, hooked_bias, Doubled])
def test_trains_as_the_oracle(case: type[nn.Module], way: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: Counter[str] = on_triton(monkeypatch)
    assert_same_training(lambda: network(case()), way, ("2",), steps=1)
    assert launched["normalise"] > 0
    assert launched["sums"] > launched["normalise"]


def test_tapped_in_front_of_the_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tapped BatchNorm's feature is read, by the hook on it, before anything could become part of it."""
    on_triton(monkeypatch)
    way = {"scheme": "transfer", "inner_steps": 1, "memory": "save"}
    assert_same_training(lambda: network(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), way, ("1", "3.0"), steps=1)
