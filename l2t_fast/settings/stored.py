"""Settings on disk: config.json of a run, table.json of a table; going on with what was made with the same."""

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from l2t_fast.errors import L2TError
from l2t_fast.files import TwiceError, parse_json, save_text
from l2t_fast.settings.defaults import check, check_flag, check_name
from l2t_fast.settings.options import TableConfig, TrainConfig

# What may have changed when a run goes on: where the data lie, what computes, who is told; and how it is called.
ANEW = ("device", "mode", "memory", "accumulate", "data_root", "workers", "download", "export", "log")
FREE = (*ANEW, "name", "runs", "resume", "quiet")


def check_same(
    now: Any,
    saved: Any,
    default: Any,
    what: str = "the run",
    free: Sequence[str] = FREE,
    flags: Mapping[str, str] | None = None,
    given: Collection[str] = (),
) -> None:
    """Raises L2TError where `what` goes on with other settings than its own; `free` ones may differ.

    Args:
        default: what counts as not given, where it is not among the `given`, names of settings as the command has them.
        flags: what the command calls those settings that it calls otherwise.
    """
    for f in dataclasses.fields(now):
        ours, theirs, usual = getattr(now, f.name), getattr(saved, f.name), getattr(default, f.name)
        if dataclasses.is_dataclass(ours):
            check_same(ours, theirs, usual, what, free, flags, given)
        elif f.name not in free and ours != theirs and (ours != usual or _called(f.name, flags) in given):
            flag = (flags or {}).get(f.name, f.name.replace("_", "-"))
            raise L2TError(
                f"{what} was made with --{flag} {shown(theirs)}, not {shown(ours)}: give the same settings again, or "
                "another --name."
            )


def _called(name: str, flags: Mapping[str, str] | None) -> str:
    return (flags or {}).get(name, name)


def updated(saved: Any, now: Any, default: Any, given: Collection[str] = ()) -> Any:
    """`saved`, with what of `ANEW` is given; `default` counts as not given, where it is not among the `given`."""
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(saved):
        ours, theirs, usual = getattr(now, f.name), getattr(saved, f.name), getattr(default, f.name)
        if dataclasses.is_dataclass(theirs):
            changes[f.name] = updated(theirs, ours, usual, given)
        elif f.name in ANEW and (ours != usual or f.name in given):
            changes[f.name] = ours
    return dataclasses.replace(saved, **changes)


def shown(value: Any) -> str:
    """A setting as the command line has it."""
    return " ".join(map(str, value)) or "nothing" if isinstance(value, tuple) else str(value)


def save_config(config: TrainConfig | TableConfig, path: Path) -> None:
    """Writes `config` as JSON."""
    save_text(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def load_config(path: Path) -> TrainConfig:
    """What `save_config` wrote of a run.

    Raises:
        L2TError: the file is missing or is no such configuration, or has a value that no option could have.
    """
    config: TrainConfig = _load(TrainConfig, path, "give a folder that `l2t-fast train` made")
    try:
        check(config)
    except L2TError as error:
        raise L2TError(f"{path}: {error}") from error
    return config


def load_table(path: Path) -> TableConfig:
    """What `save_config` wrote of a table.

    Raises:
        L2TError: as `load_config`.
    """
    config: TableConfig = _load(TableConfig, path, "give a folder that `l2t-fast table` made")
    try:
        check_name("table" if config.name is None else config.name)
        if config.threads is not None:
            check_flag("threads", config.threads)
    except L2TError as error:
        raise L2TError(f"{path}: {error}") from error
    return config


def _load(cls: Any, path: Path, advice: str) -> Any:
    try:
        return _build(cls, parse_json(path.read_bytes()), path)
    except L2TError:
        raise
    except TwiceError as error:
        raise L2TError(f"{path}: {error}: remove one of them.") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        what = " (there is no such file)" if isinstance(error, FileNotFoundError) else ""
        raise L2TError(f"{path} is not the configuration of a run: {advice}{what}.") from error


def _build(cls: Any, values: dict[str, Any], path: Path) -> Any:
    """A configuration from JSON: lists become tuples, the paths paths, nested dictionaries their own class.

    What a run of an older version does not say is as it is by default.
    """
    if not isinstance(values, dict):
        raise TypeError("no object of JSON")
    arguments: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if f.name not in values:
            continue
        value = values.pop(f.name)
        if isinstance(value, dict):
            arguments[f.name] = _build(f.default_factory, value, path)
        elif f.name in ("runs", "data_root"):
            if "\0" in value:
                raise ValueError("no path has a null byte")
            arguments[f.name] = Path(value)
        elif f.name in ("source", "source_weights", "source_width") and value is not None:
            arguments[f.name] = tuple(value) if isinstance(value, list) else (value,)
        else:
            arguments[f.name] = tuple(value) if isinstance(value, list) else value
        if not _fits(arguments[f.name], hints[f.name]):
            raise L2TError(f"{path}: '{f.name}' cannot be {json.dumps(value)}: put back what was there.")
    if values:
        raise L2TError(f"{path}: there is no setting '{next(iter(values))}': remove it.")
    return cls(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a setting of that type can have the value."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if kind is typing.Literal:
        return value in arguments
    if kind is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
