"""The command that repeats a run or a table."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from l2t_fast.errors import L2TError
from l2t_fast.settings.defaults import resolve
from l2t_fast.settings.options import PRETRAIN_NAMES, PretrainConfig, TableConfig, TrainConfig

_NOT = ("name", "runs", "resume", "quiet", "log", "download")  # of the folder and of who is told, not of what is done


def repeating_command(config: TrainConfig | TableConfig) -> str:
    """What to type for the same again under another name; without what is so by itself."""
    usual = _flat(type(config)())
    given = {name: v for name, v in _flat(config).items() if v != usual[name] and v is not None}
    if isinstance(config, TableConfig):
        return _command("table", config, given)
    if config.source.source is None:  # of a network that is trained as a source for others
        known = _flat(PretrainConfig())
        words = {PRETRAIN_NAMES.get(name, name): v for name, v in given.items()}
        return _command("pretrain", config, {name: v for name, v in words.items() if name in known})
    if given.get("source_weights"):  # such a source is not trained
        given = {name: v for name, v in given.items() if name not in ("source_classes", "source_epochs")}
    for name in list(given):
        less = {other: v for other, v in given.items() if other != name}
        if _makes(less, config):
            given = less
    return _command("train", config, given)


def _command(verb: str, config: TrainConfig | TableConfig, given: Mapping[str, Any]) -> str:
    words = ["l2t-fast", verb, "--name", f"{config.name or verb}-again"]
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def _flat(config: Any) -> dict[str, Any]:
    """The settings by name, those of its parts too."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found |= _flat(value)
        elif f.name not in _NOT:
            found[f.name] = value
    return found


def _makes(given: Mapping[str, Any], config: TrainConfig) -> bool:
    """Whether `train` makes `config` of these settings."""
    try:
        return _flat(resolve(_with(TrainConfig(), given))) == _flat(config)
    except L2TError:
        return False


def _with(config: Any, given: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        part = getattr(config, f.name)
        values[f.name] = _with(part, given) if dataclasses.is_dataclass(part) else given.get(f.name, part)
    return dataclasses.replace(config, **values)
