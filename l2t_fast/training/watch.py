"""What a training tells while it runs."""

from typing import Any, Protocol

from torch import Tensor


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
