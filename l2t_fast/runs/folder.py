"""The folder of a table: what it was made with, and what went wrong."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from l2t_fast.errors import L2TError
from l2t_fast.files import at_home, load_json, make_folder, save_text
from l2t_fast.networks.checkpoint import split_prefix
from l2t_fast.networks.libraries import is_file
from l2t_fast.reports.column import Problems, in_order, read_problems
from l2t_fast.runs.build import trains_sources, uses_sources
from l2t_fast.runs.lock import alone, begun, check_free
from l2t_fast.runs.made import TARGET_ONLY
from l2t_fast.settings.defaults import check_name
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import FREE, check_same, load_config, load_table, save_config

_ROWS = ("method", "seeds")  # that a column which goes on may be given anew


def open_table(config: TableConfig) -> tuple[Path, TableConfig]:
    """The folder of the table, and its settings."""
    name = f"table-{'-'.join(config.dataset)}" if config.name is None else config.name
    check_name(name)
    folder, config = config.runs / name, dataclasses.replace(config, name=name)
    check_free(folder)
    if not begun(folder):
        return folder, config
    saved = load_table(folder / "table.json")
    if config.threads not in (None, saved.threads):
        raise L2TError(f"the table was made with --threads {saved.threads}, not {config.threads}: leave out --threads.")
    return folder, dataclasses.replace(config, threads=saved.threads)


@contextlib.contextmanager
def only_command(folder: Path, columns: Iterable[TrainConfig]) -> Iterator[None]:
    """Makes the folder, and refuses a second command in it, in one of the columns or in a source of theirs."""
    places = [folder, *dict.fromkeys(place for config in columns for place in _places(folder, config))]
    with contextlib.ExitStack() as stack:
        for place in places:
            make_folder(place)
            stack.enter_context(alone(place))
        yield


def shared_sources(folder: Path, config: TrainConfig) -> Path:
    """Where the sources are that all columns of a data set share."""
    return folder / "sources" / config.data.dataset


def _places(folder: Path, config: TrainConfig) -> list[Path]:
    """The folder of a column, and that of the source it shares, if it trains one."""
    sources = [shared_sources(folder, config)] if trains_sources(config) else []
    return [folder / str(config.name), *sources]


def check_column(folder: Path, config: TrainConfig) -> None:
    """Raises L2TError where a column or its source is there already, made with other settings or files."""
    column, source = folder / str(config.name), shared_sources(folder, config)
    for place, what, free in (
        (column, f"column {config.name}", _ROWS),
        (source, f"the source of {config.data.dataset}", (*_ROWS, *TARGET_ONLY)),
    ):
        if (place / "config.json").exists():
            saved = load_config(place / "config.json")
            ours = config if place == column else dataclasses.replace(config, target=saved.target)
            check_same(ours, saved, saved, what, (*FREE, *free))
    if (column / "inputs.json").exists():
        inputs = load_json(column / "inputs.json")
        for name, digest in fingerprints(config).items():
            if inputs.get(name, digest) != digest:
                raise L2TError(
                    f"column {config.name} was made with another --{name}: put that back, or give another --name."
                )


def write_settings(folder: Path, config: TrainConfig) -> None:
    """config.json and inputs.json of a column, with all rows that it ever had, and of its source."""
    column, *_ = places = _places(folder, config)
    for place in places:
        path, full = place / "config.json", config
        if path.exists():
            saved = load_config(path)
            full = dataclasses.replace(
                config,
                method=in_order({*(saved.method or ()), *(config.method or ())}),
                seeds=tuple(sorted({*(saved.seeds or ()), *(config.seeds or ())})),
            )
        save_config(full, path)
        if place == column:
            save_text(column / "inputs.json", json.dumps(fingerprints(full), indent=2) + "\n")


def write_problems(column: Path, config: TrainConfig, found: Problems) -> None:
    """problems.json: those found now, and those of methods that this command does not have."""
    others = {method: why for method, why in read_problems(column).items() if method not in (config.method or ())}
    save_text(column / "problems.json", json.dumps(others | found, indent=2) + "\n")


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Of what the settings only point at, the SHA-256: weights of sources, split files, npz; of a folder its place."""
    weights = [split_prefix(name)[0] for name in config.source.source_weights or () if is_file(name)]
    splits = [Path(f"{config.data.split}-{part}") for part in ("train", "val", "test")] if config.data.split else []
    found = {
        f"{kind} {i + 1}": hashlib.sha256(at_home(path).read_bytes()).hexdigest()
        for kind, paths in (
            ("source-weights", weights if uses_sources(config) else []),
            ("split", splits),
            ("data-root", [config.data.data_root] if config.data.dataset == "npz" else []),
        )
        for i, path in enumerate(paths)
        if at_home(path).is_file()  # what is missing the preflight refuses
    }
    if config.data.dataset == "folder":
        found["data-root"] = str(at_home(config.data.data_root).resolve())
    return found
