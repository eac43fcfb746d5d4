"""Hugging Face Accelerate: it prepares the batches and the schedule, saves everything, and goes on from there.

pip install 'l2t-fast[accelerate,digits]'
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from digits import LAYERS, accuracy, images, network, trained_source
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from l2t_fast import L2T, Engine


def main(epochs: int = 8, folder: str | Path | None = None) -> Engine:
    torch.manual_seed(0)
    accelerator = Accelerator()
    train, test = images(5)
    target = network(8).to(accelerator.device)
    example = train[0][0][None].to(accelerator.device)
    learner = L2T(
        trained_source().to(accelerator.device), target, source_layers=LAYERS, target_layers=LAYERS, example=example
    )
    engine = Engine(learner, lr=0.05, meta_lr=1e-3)
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    schedule = CosineAnnealingLR(engine.optimizer, T_max=epochs * len(loader))
    loader, _, schedule = accelerator.prepare(loader, engine.optimizer, schedule)
    for epoch in range(epochs):
        for x, y in loader:
            metrics = engine.step(x, y)
            schedule.step()
        accelerator.print(f"epoch {epoch}: loss {metrics['loss']:.3f}, test accuracy {accuracy(target, test):.3f}")
    folder = folder or tempfile.mkdtemp()
    accelerator.save_state(str(folder))  # the state of engine.optimizer is that of the engine
    accelerator.load_state(str(folder))
    return engine


if __name__ == "__main__":
    main()
