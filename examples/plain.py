"""A loop of one's own in plain PyTorch: AdamW, no decay of biases and norms, clipping, a schedule, a checkpoint."""

import tempfile
from pathlib import Path

import torch
from digits import DEVICE, LAYERS, accuracy, images, network, trained_source
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from l2t_fast import L2T, AdamW, Engine


def main(epochs: int = 8, folder: str | Path | None = None) -> float:
    torch.manual_seed(0)
    train, test = images(5)
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    target = network(8).to(DEVICE)
    example = train[0][0][None].to(DEVICE)
    learner = L2T(trained_source(), target, source_layers=LAYERS, target_layers=LAYERS, example=example)

    no_decay = [p for p in target.parameters() if p.dim() < 2]
    engine = Engine(
        learner,
        lr=1e-2,
        meta_lr=1e-3,
        optimizer=AdamW(weight_decay=0.05),
        groups=[{"params": no_decay, "weight_decay": 0.0}],
        max_grad_norm=5.0,
    )
    steps = epochs * len(loader)
    schedule = OneCycleLR(engine.optimizer, max_lr=1e-2, total_steps=steps, cycle_momentum=False)
    for epoch in range(epochs):
        for x, y in loader:
            metrics = engine.step(x, y)
            schedule.step()
        print(f"epoch {epoch}: loss {metrics['loss']:.3f}, test accuracy {accuracy(target, test):.3f}")

    path = Path(folder or tempfile.mkdtemp()) / "last.pt"
    torch.save({"engine": engine.state_dict(), "schedule": schedule.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    engine.load_state_dict(saved["engine"])
    schedule.load_state_dict(saved["schedule"])
    return accuracy(target, test)


if __name__ == "__main__":
    main()
