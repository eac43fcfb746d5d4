"""Lightning with manual optimisation: global_step counts, ModelCheckpoint saves and resumes, no optimizer of straw.

pip install 'l2t-fast[lightning,digits]'
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import LAYERS, images, network, trained_source
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from l2t_fast import L2T, Engine


class Transfer(LightningModule):
    """The learner is a module of Lightning's; the engine is made when it stands on its device."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # the engine takes the gradients itself
        source, self.target = trained_source().cpu(), network(8)
        example = torch.zeros(2, 1, 8, 8)
        self.learner = L2T(source, self.target, source_layers=LAYERS, target_layers=LAYERS, example=example)

    def configure_optimizers(self) -> Any:
        self.engine = Engine(self.learner, lr=0.05, meta_lr=1e-3)
        schedule = CosineAnnealingLR(self.engine.optimizer, T_max=self.trainer.max_epochs or 1)
        return [self.engine.optimizer], [schedule]

    def training_step(self, batch: Any, index: int) -> None:
        metrics = self.optimizers().step(lambda: self.engine.step(*batch))  # counted in global_step
        self.log_dict({name: metrics[name] for name in ("loss", "meta_loss")}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        logits = self.target(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean(), prog_bar=True)


def main(epochs: int = 8, folder: str | Path | None = None, resume: str | Path | None = None) -> Trainer:
    seed_everything(0, verbose=False)
    train, test = images(5)
    checkpoints = ModelCheckpoint(folder or tempfile.mkdtemp(), save_top_k=2, monitor="val_accuracy", mode="max")
    trainer = Trainer(
        max_epochs=epochs, callbacks=[checkpoints], logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    trainer.fit(Transfer(), loader, DataLoader(test, 256), ckpt_path=resume)
    print(f"{trainer.global_step} steps, {trainer.callback_metrics['val_accuracy']:.3f}: {checkpoints.best_model_path}")
    return trainer


if __name__ == "__main__":
    main()
