"""What stands between a network's Python and autograd, taken out of the way for a forward pass.

- `torch.utils.checkpoint` runs layers once more in the backward pass, when a simulated step's tensors no longer stand
  in the places of the parameters: here they run once, and keep what they need. (memory="recompute" holds one step's.)
- What the user compiled with `torch.compile` has a first derivative only: here its Python runs.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint as checkpoint


class _Reentrant:
    """In the place of `checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of the generator around a layer that is not reentrant."""
    yield


_INSTEAD = {
    name: _Reentrant if name == "CheckpointFunction" else _nothing_around
    for name in vars(checkpoint)
    if name == "CheckpointFunction" or name.startswith("_checkpoint_without_reentrant_generator")
}


@contextmanager
def run_directly() -> Iterator[None]:
    """Inside, checkpointed and compiled parts of a network run as if they were neither; for the whole process."""
    before = {name: getattr(checkpoint, name) for name in _INSTEAD}
    try:
        vars(checkpoint).update(_INSTEAD)
        # Dynamo takes seconds to load; what has not loaded it has compiled nothing.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        vars(checkpoint).update(before)
