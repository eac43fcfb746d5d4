"""Settings on disk: config.json of a run, table.json of a table; going on with what was made with the same."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2t_fast.errors import L2TError
from l2t_fast.files import save_text
from l2t_fast.settings.options import TableConfig, TrainConfig

# What a run may be given anew when it goes on: where data lie, and what computes.
ELSEWHERE = ("name", "runs", "resume", "device", "mode", "memory", "data_root", "workers", "download")


def check_same(given: Any, saved: Any, default: Any, what: str = "the run", free: Sequence[str] = ELSEWHERE) -> None:
    """Raises L2TError where `what` goes on with other settings than its own; `free` ones may differ.

    default: what counts as not given.
    """
    for f in dataclasses.fields(given):
        ours, theirs, usual = getattr(given, f.name), getattr(saved, f.name), getattr(default, f.name)
        if dataclasses.is_dataclass(ours):
            check_same(ours, theirs, usual, what, free)
        elif f.name not in free and ours not in (usual, theirs):
            flag = f.name.replace("_", "-")
            raise L2TError(
                f"{what} was made with --{flag} {_shown(theirs)}, not {_shown(ours)}: give the same settings again, or "
                "another --name."
            )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "nothing" if isinstance(value, tuple) else str(value)


def save_config(config: TrainConfig | TableConfig, path: Path) -> None:
    """Writes `config` as JSON."""
    save_text(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def load_config(path: Path) -> TrainConfig:
    """What `save_config` wrote of a run.

    Raises:
        L2TError: the file is missing or is no such configuration.
    """
    config: TrainConfig = _load(TrainConfig, path, "resume a folder that `l2t-fast train` made")
    return config


def load_table(path: Path) -> TableConfig:
    """What `save_config` wrote of a table.

    Raises:
        L2TError: the file is missing or is no such configuration.
    """
    config: TableConfig = _load(TableConfig, path, "give a folder that `l2t-fast table` made")
    return config


def _load(cls: Any, path: Path, advice: str) -> Any:
    try:
        return _build(cls, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise L2TError(f"{path} is not the configuration of a run: {advice}.") from error


def _build(cls: Any, values: dict[str, Any]) -> Any:
    """A configuration from JSON: lists become tuples, the paths paths, nested dictionaries their own class.

    What a run of an older version does not say is as it is by default.
    """
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.name not in values:
            continue
        value = values.pop(f.name)
        if isinstance(value, dict):
            arguments[f.name] = _build(f.default_factory, value)
        elif f.name in ("runs", "data_root"):
            arguments[f.name] = Path(value)
        elif f.name in ("source", "source_weights", "source_width") and value is not None:
            arguments[f.name] = tuple(value) if isinstance(value, list) else (value,)
        else:
            arguments[f.name] = tuple(value) if isinstance(value, list) else value
    if values:
        raise KeyError(*values)
    return cls(**arguments)
