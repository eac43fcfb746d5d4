"""A DataLoader whose batches are dictionaries, with images of its own for the meta-gradient (scheme="simulation")."""

from typing import Any

import torch
from digits import DEVICE, LAYERS, accuracy, images, network, trained_source
from torch.utils.data import DataLoader, Dataset, random_split

from l2t_fast import L2T, Engine


class Named(Dataset[dict[str, Any]]):
    """Images that say what they are."""

    def __init__(self, pictures: Any) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        x, y = self.pictures[i]
        return {"image": x, "label": y, "file": f"digit-{i}.png"}


def main(epochs: int = 8) -> float:
    torch.manual_seed(0)
    train, test = images(5)
    learned, held_out = random_split(train, [0.8, 0.2])
    loader = DataLoader(Named(learned), 64, shuffle=True, drop_last=True)
    held = DataLoader(Named(held_out), 64, shuffle=True, drop_last=True)
    target = network(8).to(DEVICE)
    example = train[0][0][None].to(DEVICE)
    learner = L2T(trained_source(), target, source_layers=LAYERS, target_layers=LAYERS, example=example)
    engine = Engine(learner, lr=0.05, meta_lr=1e-3, scheme="simulation")
    for epoch in range(epochs):
        for batch in loader:
            val = next(iter(held))
            metrics = engine.step(batch["image"], batch["label"], val=(val["image"], val["label"]))
        print(f"epoch {epoch}: L_meta {metrics['meta_loss']:.3f}, test accuracy {accuracy(target, test):.3f}")
    return accuracy(target, test)


if __name__ == "__main__":
    main()
