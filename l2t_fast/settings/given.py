"""Settings that a file gives, and single ones by the names that they have there."""

import dataclasses
import difflib
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from l2t_fast.errors import L2TError
from l2t_fast.settings.options import PRETRAIN_NAMES, PretrainConfig, SourceConfig, TableConfig, TrainConfig
from l2t_fast.settings.stored import load_config, load_table

_OWN = ("name", "runs", "resume")  # of the command alone: a repeated run has a folder of its own
_OF_OPTIMIZER = ("lr", "momentum", "weight_decay", "nesterov")
_COMMANDS = {"train": TrainConfig(), "table": TableConfig(), "pretrain": PretrainConfig()}


def without_set(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with the flags that `--set KEY=VALUE ...` stands for, so that one parser reads all.

    Raises:
        L2TError: no KEY=VALUE, or a KEY that config.json does not have.
    """
    config = _COMMANDS.get(arguments[0] if arguments else "")
    if config is None or "--set" not in arguments:
        return list(arguments)
    kept: list[str] = []
    flags: list[str] = []
    inside = False
    for word in arguments:
        if word.startswith("--"):
            inside = word == "--set"
            kept += [] if inside else [word]
        elif inside:
            flags += _flag(word, config)
        else:
            kept.append(word)
    return kept + flags


def _flag(setting: str, config: Any) -> list[str]:
    key, equals, value = setting.partition("=")
    keys = _settable(config)
    if not equals or key not in keys:
        same = [name for name in keys if key in (keys[name][0], name.rpartition(".")[2])]
        like = [*same, *difflib.get_close_matches(key, keys, n=1), "optim.lr"][0]
        raise L2TError(f"--set {setting:.80}: give KEY=VALUE with a KEY as the saved settings have it, such as {like}.")
    option, kind = keys[key]
    flag = option.replace("_", "-")
    if kind is not bool:
        return [f"--{flag}", *(value.split(",") if "tuple" in str(kind) else [value])]
    if value not in ("true", "false"):
        raise L2TError(f"--set {setting:.80}: give true or false.")
    return [f"--{flag}" if value == "true" else f"--no-{flag}"]


def _settable(config: Any) -> dict[str, tuple[str, Any]]:
    """The option of a command and its type, by its name in the saved settings: optim.lr, ..."""
    if not isinstance(config, PretrainConfig):
        return {key: (key.rpartition(".")[2], kind) for key, kind in _keys(config).items()}
    found: dict[str, tuple[str, Any]] = {}
    own = {key.rpartition(".")[2] for key in _keys(config)}
    for key, kind in _keys(TrainConfig()).items():  # of which its config.json is one
        last = key.rpartition(".")[2]
        if (option := PRETRAIN_NAMES.get(last, last)) in own:
            found[key] = option, kind
    return found


def _keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """The types of all settings, by group and name."""
    hints = typing.get_type_hints(type(config))
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found |= _keys(value, f"{prefix}{f.name}.")
        elif f.name not in _OWN:
            found[prefix + f.name] = hints[f.name]
    return found


def with_file(config: Any, path: Path | None, given: Collection[str]) -> Any:
    """The settings of a config.json (of a table.json, for a table), with those on top that are given beside it.

    Where the run is and what it is called the command says, not the file.

    Args:
        given: as for `l2t_fast.runs.run.run`.

    Raises:
        L2TError: the file cannot be had; the run is to be resumed.
    """
    if path is None:
        return config
    if getattr(config, "resume", False):
        raise L2TError("--resume goes on with a run, and --config repeats one: leave out one of them.")
    is_table = isinstance(config, TableConfig)
    if path.is_dir():
        path = path / ("table.json" if is_table else "config.json")
    saved: Any = load_table(path) if is_table else load_config(path)
    if isinstance(config, PretrainConfig):
        saved = _of_source(saved, path)
    own = {name: getattr(config, name) for name in _OWN if hasattr(config, name)}
    merged = dataclasses.replace(_on_top(saved, config, type(config)(), given), **own)
    if merged.optim.optimizer != saved.optim.optimizer:  # what had been filled in, or was meant, for another one
        free = {name: getattr(config.optim, name) for name in _OF_OPTIMIZER}
        merged = dataclasses.replace(merged, optim=dataclasses.replace(merged.optim, **free))
    source = getattr(merged, "source", SourceConfig())
    if source.source_weights is not None:  # what had been filled in for a source without
        free = {name: None for name in ("source_classes", "source_epochs") if name not in given}
        merged = dataclasses.replace(merged, source=dataclasses.replace(source, **free))
    return merged


def check_source(saved: TrainConfig, path: Path) -> None:
    """Raises L2TError where the settings at `path` are not those of a run that `pretrain` made."""
    if saved.source != SourceConfig() or saved.method != ("scratch",) or len(saved.seeds or ()) != 1:
        raise L2TError(f"{path} is not the configuration of a source: give a run that `l2t-fast pretrain` made.")


def _of_source(saved: TrainConfig, path: Path) -> PretrainConfig:
    """What `pretrain` was told, from its config.json."""
    check_source(saved, path)
    names = {f.name for f in dataclasses.fields(PretrainConfig)} & {f.name for f in dataclasses.fields(TrainConfig)}
    same = {name: getattr(saved, name) for name in names}
    target, (seed,) = saved.target, saved.seeds or (0,)
    return PretrainConfig(**same, network=target.target, width=target.target_width, seed=seed)


def _on_top(saved: Any, now: Any, usual: Any, given: Collection[str]) -> Any:
    """`saved`, with what of `now` is given, or is not as usual."""
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(saved):
        ours, theirs, default = getattr(now, f.name), getattr(saved, f.name), getattr(usual, f.name)
        if dataclasses.is_dataclass(theirs):
            changes[f.name] = _on_top(theirs, ours, default, given)
        elif ours != default or f.name in given:
            changes[f.name] = ours
    return dataclasses.replace(saved, **changes)
