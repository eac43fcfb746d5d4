"""What a training is made of: its checkpoints say it, and are refused where it is another."""

import dataclasses
import zlib
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from l2t_fast.data.splits import Data
from l2t_fast.learner.learner import L2T
from l2t_fast.settings.options import TrainConfig
from l2t_fast.settings.stored import FREE, shown

# What the source that columns share does not depend on.
TARGET_ONLY = (
    "per_class",
    "classes",
    "split",
    "epochs",
    "meta_lr",
    "meta_weight_decay",
    "beta",
    "where",
    "inner_steps",
)
_ROWS = ("method", "seeds")


def cell_settings(config: TrainConfig) -> dict[str, str]:
    """The settings of a cell, by flag."""
    return _settings(config, (*FREE, *_ROWS))


def shared_settings(config: TrainConfig) -> dict[str, str]:
    """The settings that the training of a source depends on, by flag."""
    return _settings(config, (*FREE, *_ROWS, *TARGET_ONLY, "target", "settings", "source_weights"))


def _settings(part: Any, free: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if f.name in free:
            continue
        if dataclasses.is_dataclass(value):
            found |= _settings(value, free)
        else:
            found[f"--{f.name.replace('_', '-')}"] = shown(value)
    return found


def layers(learner: L2T) -> dict[str, str]:
    """The layers that are matched, which may have been found."""
    sources = "; ".join(", ".join(names) for names in learner.source_layers)
    return {"layers": f"{sources} → {', '.join(learner.target_layers)}"} if learner.uses_sources else {}


def inputs(sources: Iterable[nn.Module], data: Data) -> dict[str, str]:
    """Checksums of the images, of what some of their files hold, and of the sources' weights."""
    weights = 0
    for source in sources:
        for tensor in source.state_dict().values():
            weights = zlib.crc32(tensor.detach().cpu().contiguous().numpy().data, weights)
    return {"images": data.checksum(), "images in the files": data.sample(), "source weights": f"{weights:08x}"}
