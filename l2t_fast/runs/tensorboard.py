"""TensorBoard event files of a training: numbers, λ over the epochs, and what the strongest pair matches."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2t_fast.engine.engine import Engine
from l2t_fast.errors import L2TError
from l2t_fast.kernels.matching.aten import resize
from l2t_fast.learner.learner import L2T
from l2t_fast.learner.undisturbed import undisturbed
from l2t_fast.reports.pictures.canvas import pixels
from l2t_fast.reports.pictures.features import draw_features
from l2t_fast.reports.pictures.weights import draw_pair_weights
from l2t_fast.training.log import read_epochs
from l2t_fast.training.trackers import scalars
from l2t_fast.training.watch import Callback, Training

_PICTURES = 20  # of a training, over its epochs
_IMAGES, _CHANNELS = 3, 4  # that the picture of features shows


def check_tensorboard() -> None:
    """Raises L2TError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise L2TError("--log tensorboard needs TensorBoard: pip install 'l2t-fast[tensorboard]'.")


class ToTensorBoard(Callback):
    """Writes FOLDER/tensorboard/; the step counts iterations over all epochs.

    Scalars iteration/NAME and epoch/NAME (λ of each pair too), and some twenty times in a training the images
    pair_weights, pairs x epochs, and matched_features, R(S) beside r T of the pair with the highest λ.
    """

    def on_start(self, training: Training) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter  # loads TensorBoard

        start = training.step(training.epoch, training.iteration)
        self._training = training
        self._every = max(1, training.epochs // _PICTURES)
        # What a killed run told of later steps counts no longer.
        self._to: Any = SummaryWriter(str(training.folder / "tensorboard"), purge_step=start or None)
        rows = read_epochs(training.folder / "metrics.jsonl")
        self._weights: list[list[float]] = [row["pair_weights"] for row in rows if "pair_weights" in row]
        self._images: Tensor | None = None
        lines = [f"| {name} | {value} |" for name, value in training.settings.items()]
        self._to.add_text("settings", "\n".join(["| | |", "|---|---|", *lines]), start)

    def on_iteration(self, engine: Engine, epoch: int, iteration: int, metrics: Mapping[str, Any]) -> None:
        # A line a pair and iteration would take longer to write than a GPU takes to compute: the epochs have them.
        step = self._training.step(epoch, iteration)
        for name, value in metrics.items():
            if not isinstance(value, list):
                self._to.add_scalar(f"iteration/{name}", value, step)

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        training, epoch = self._training, int(row["epoch"])
        step = training.step(epoch + 1, -1)  # its last iteration
        pairs = [pair.replace(" → ", "_to_").replace(":", ".") for pair in training.pairs]  # letters that tags may have
        for name, value in scalars(row, pairs).items():
            if name != "epoch":
                self._to.add_scalar(f"epoch/{name}", value, step)
        if "pair_weights" in row:
            self._weights.append(row["pair_weights"])
            if (epoch + 1) % self._every == 0 or epoch + 1 == training.epochs:
                self._draw(step)
        self._to.flush()

    def on_end(self) -> None:
        self._to.close()

    def _draw(self, step: int) -> None:
        training, learner, now = self._training, self._training.engine.learner, self._weights[-1]
        if len(learner.where):
            picture = draw_pair_weights(self._weights, training.pairs, training.title)
            self._to.add_image("pair_weights", pixels(picture), step, dataformats="HWC")
        best = int(np.argmax(now))
        device = next(learner.parameters()).device
        with undisturbed(learner.target, device):  # reading images may draw random numbers, too
            x = self._images = _some_images(training) if self._images is None else self._images
            source, target, channels = matched_features(learner, best, x)
        title = f"{training.title}: {training.pairs[best]}, λ {now[best]:.2f}"
        picture = draw_features(_on_host(x), _on_host(source), _on_host(target), channels, title)
        self._to.add_image("matched_features", pixels(picture), step, dataformats="HWC")


def _some_images(training: Training) -> Tensor:
    """x [N, 3, H, W], of the validation images where there are any."""
    images = training.data.val if len(training.data.val) else training.data.test
    spread = torch.linspace(0, len(images) - 1, min(_IMAGES, len(images))).long()
    device = next(training.engine.learner.parameters()).device
    chosen = images.select(spread, images.labels[spread.to(images.labels.device)], augment=False).to(device)
    return next(iter(chosen.eval_batches(_IMAGES)))[0]


@torch.no_grad()
def matched_features(learner: L2T, pair: int, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """(R(S), r T, channels): [N, K, h, w] of the K channels that have most of the pair's weight w.

    The target is put in evaluation mode.
    """
    learner.target.eval()
    S = learner.source_features(x)
    _, T = learner.target_outputs(x)
    feature = T[learner.target_of[pair]]  # [N, C_t, h, w]
    resized = resize(S[learner.source_of[pair]], feature.shape[2:])  # [N, C_s, h, w]
    w = learner.weights(S)[0][pair].mean(0)  # [C_s]
    channels = w.argsort(descending=True, stable=True)[:_CHANNELS]
    return resized[:, channels], learner.projections[pair](feature)[:, channels], channels.tolist()


def _on_host(x: Tensor) -> Any:
    return x.double().cpu().numpy()
