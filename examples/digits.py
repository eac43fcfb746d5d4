"""What the examples share: scikit-learn's digits (8x8 pixels), a small network, and one that knows five of the digits.

The source learns 0 to 4; the target is to learn 5 to 9 with its help.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 5
LAYERS = ["early", "middle", "late"]  # of `network`, as in named_modules()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def images(first: int) -> tuple[TensorDataset, TensorDataset]:
    """(training, test) images [1, 8, 8] of the five digits from `first` on, and their labels from 0 to 4."""
    found = load_digits()
    x, y = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.as_tensor(found.target) - first
    chosen = (y >= 0) & (y < CLASSES)
    x, y = x[chosen], y[chosen]
    test = torch.arange(len(x)) % 4 == 0
    return TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test])


def network(width: int) -> nn.Sequential:
    """[B, 1, 8, 8] -> [B, 5]."""

    def block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

    parts = {
        "early": block(1, width, 1),
        "middle": block(width, 2 * width, 2),
        "late": block(2 * width, 4 * width, 2),
        "head": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES)),
    }
    return nn.Sequential(OrderedDict(parts))


def trained_source(epochs: int = 4) -> nn.Sequential:
    """A network that knows the digits 0 to 4."""
    torch.manual_seed(0)
    source = network(16)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for x, y in DataLoader(images(0)[0], 64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(source(x), y).backward()
            optimizer.step()
    return source.to(DEVICE)


@torch.no_grad()
def accuracy(target: nn.Module, test: TensorDataset) -> float:
    """The share of the test images that it gets right."""
    x, y = (t.to(DEVICE) for t in test.tensors)
    target.eval()
    right: Tensor = target(x).argmax(1) == y
    target.train()
    return right.float().mean().item()
