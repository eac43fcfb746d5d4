"""What a training tells while it runs: the terminal at once, trackers once the numbers are on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from l2t_fast.data.splits import Data
from l2t_fast.engine.engine import Engine


class Watch(Protocol):
    """What a training tells those who watch it, and how they stop it."""

    def resumed(self, epoch: int, iteration: int) -> None:
        """The training goes on from a checkpoint."""

    def iteration(self, epoch: int, metrics: dict[str, Tensor]) -> None:
        """One iteration is done."""

    def evaluating(self, part: str) -> None:
        """Accuracy on `part` ("validation", "test") is being measured."""

    def epoch(self, row: dict[str, Any]) -> None:
        """One epoch is done; `row` is its line of metrics.jsonl."""

    def say(self, text: str) -> None:
        """A piece of text, as it comes."""

    def stop_asked(self) -> bool:
        """Whether to save and stop now."""


@dataclass(frozen=True)
class Training:
    """What a callback is told of a training that starts, or goes on, at (`epoch`, `iteration`).

    Attributes:
        title: "l2t-ww, seed 0"; "" where there is one training alone.
        folder: that of its metrics.jsonl.
        pairs: a name for each pair, such as "layer2 → features.6".
        data: its images, on the engine's device.
        epochs, batches: how many there are, and iterations in each.
        settings: what it is made of, by name.
    """

    title: str
    folder: Path
    engine: Engine
    pairs: Sequence[str]
    data: Data
    epochs: int
    batches: int
    epoch: int
    iteration: int
    settings: Mapping[str, str]

    def step(self, epoch: int, iteration: int) -> int:
        """Iterations before that one, over all epochs."""
        return epoch * self.batches + iteration


class Callback:
    """Overwrite what is wanted. All of it is told from the rows of metrics.jsonl, as they are written.

    Metrics stay on the device until there are some of them, so that `on_iteration` comes up to a hundred iterations
    after its iteration, and at the latest with the end of the epoch: a callback never makes the engine wait. Rows that
    a killed run had told, and whose checkpoint was not written any more, are told again when it goes on.
    """

    def on_start(self, training: Training) -> None:
        """A training starts, or goes on from its checkpoint."""

    def on_iteration(self, engine: Engine, epoch: int, iteration: int, metrics: Mapping[str, Any]) -> None:
        """One iteration, of which `metrics` holds numbers and, of the pairs, lists of numbers."""

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        """One epoch: the means over its iterations, and the accuracy on the validation images."""

    def on_end(self) -> None:
        """The training has ended, or was stopped, or has failed."""
