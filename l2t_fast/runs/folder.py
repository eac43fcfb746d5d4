"""The folder of a table: what it was made with, and what went wrong."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from l2t_fast.choices import METHODS
from l2t_fast.errors import L2TError
from l2t_fast.files import save_text
from l2t_fast.networks.checkpoint import split_prefix
from l2t_fast.reports.column import Problems
from l2t_fast.runs import workers
from l2t_fast.runs.build import trains_sources, uses_sources
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import FREE, check_same, load_config, load_table, save_config

# What a column that goes on may be given anew, and what the source that columns share does not depend on.
_ROWS = ("method", "seeds")
_TARGET_ONLY = (
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


def open_table(config: TableConfig) -> tuple[Path, TableConfig]:
    """The folder of the table, and its settings."""
    name = config.name or f"table-{'-'.join(config.dataset)}"
    folder, config = config.runs / name, dataclasses.replace(config, name=name)
    if not folder.exists() or not any(folder.iterdir()):
        return folder, config
    saved = load_table(folder / "table.json")
    if config.threads not in (None, saved.threads):
        raise L2TError(f"the table was made with --threads {saved.threads}, not {config.threads}: leave out --threads.")
    return folder, dataclasses.replace(config, threads=saved.threads)


@contextlib.contextmanager
def only_command(folder: Path) -> Iterator[None]:
    """Refuses a second command in the folder."""

    def occupied() -> bool:
        raise L2TError(f"another `l2t-fast table` works in {folder}: wait for it, or give another --name.")

    with workers.alone(folder, occupied):
        yield


def shared_sources(folder: Path, config: TrainConfig) -> Path:
    """Where the sources are that all columns of a data set share."""
    return folder / "sources" / config.data.dataset


def check_column(folder: Path, config: TrainConfig) -> None:
    """Raises L2TError where a column or its source is there already, made with other settings or files."""
    column, source = folder / str(config.name), shared_sources(folder, config)
    for place, what, free in (
        (column, f"column {config.name}", _ROWS),
        (source, f"the source of {config.data.dataset}", (*_ROWS, *_TARGET_ONLY)),
    ):
        if (place / "config.json").exists():
            saved = load_config(place / "config.json")
            ours = config if place == column else dataclasses.replace(config, target=saved.target)
            check_same(ours, saved, saved, what, (*FREE, *free))
    if (column / "inputs.json").exists():
        inputs = json.loads((column / "inputs.json").read_text())
        for name, digest in fingerprints(config).items():
            if inputs.get(name, digest) != digest:
                raise L2TError(
                    f"column {config.name} was made with another --{name}: put that back, or give another --name."
                )


def write_settings(folder: Path, config: TrainConfig) -> None:
    """config.json and inputs.json of a column, with all rows that it ever had, and of its source."""
    column = folder / str(config.name)
    places = [column]
    if trains_sources(config):
        places.append(shared_sources(folder, config))
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
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
    path = column / "problems.json"
    before: Problems = json.loads(path.read_text()) if path.exists() else {}
    others = {method: why for method, why in before.items() if method not in (config.method or ())}
    save_text(path, json.dumps(others | found, indent=2) + "\n")


def in_order(methods: Collection[str]) -> tuple[str, ...]:
    """As the rows of a table stand."""
    return tuple(name for name in METHODS if name in methods)


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Of what the settings only point at, the SHA-256: weights of sources, split files, npz; of a folder its place."""
    weights = [split_prefix(name)[0] for name in config.source.source_weights or () if name != "imagenet"]
    splits = [Path(f"{config.data.split}-{part}") for part in ("train", "val", "test")] if config.data.split else []
    found = {
        f"{kind} {i + 1}": hashlib.sha256(path.expanduser().read_bytes()).hexdigest()
        for kind, paths in (
            ("source-weights", weights if uses_sources(config) else []),
            ("split", splits),
            ("data-root", [config.data.data_root] if config.data.dataset == "npz" else []),
        )
        for i, path in enumerate(paths)
        if path.expanduser().is_file()  # what is missing the preflight refuses
    }
    if config.data.dataset == "folder":
        found["data-root"] = str(config.data.data_root.expanduser().resolve())
    return found
