"""Soft labels: mixup (Zhang et al. 2018) with label smoothing. Any twice-differentiable loss goes the same way."""

import torch
import torch.nn.functional as F
from digits import CLASSES, DEVICE, LAYERS, accuracy, images, network, trained_source
from torch import Tensor, nn
from torch.utils.data import DataLoader

from l2t_fast import L2T, Engine


def mixup(x: Tensor, y: Tensor, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """Each image mixed with another, and the probabilities [B, classes] of the two labels."""
    share = torch.distributions.Beta(alpha, alpha).sample()
    other = torch.randperm(len(x))
    soft = F.one_hot(y, CLASSES).to(x)
    return share * x + (1 - share) * x[other], share * soft + (1 - share) * soft[other]


def main(epochs: int = 8) -> float:
    torch.manual_seed(0)
    train, test = images(5)
    target = network(8).to(DEVICE)
    example = train[0][0][None].to(DEVICE)
    learner = L2T(trained_source(), target, source_layers=LAYERS, target_layers=LAYERS, example=example)
    engine = Engine(learner, lr=0.05, meta_lr=1e-3, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    for epoch in range(epochs):
        for x, y in DataLoader(train, 64, shuffle=True, drop_last=True):
            metrics = engine.step(*mixup(x, y))
        print(f"epoch {epoch}: loss {metrics['loss']:.3f}, test accuracy {accuracy(target, test):.3f}")
    return accuracy(target, test)


if __name__ == "__main__":
    main()
