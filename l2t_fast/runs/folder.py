"""The folder of a table: what it was made with, and what went wrong."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from l2t_fast.errors import L2TError
from l2t_fast.files import save_text
from l2t_fast.methods import METHODS
from l2t_fast.reports.column import Problems
from l2t_fast.runs import workers
from l2t_fast.runs.build import source_folders, uses_sources
from l2t_fast.settings.options import TableConfig, TrainConfig
from l2t_fast.settings.stored import FREE, check_same, load_config, load_table, save_config

# What a column that goes on may be given anew, and what the source that columns share does not depend on.
_ROWS = ("method", "seeds")
_OF_TARGETS = (
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


def check_column(folder: Path, config: TrainConfig, device: torch.device) -> None:
    """A column that is there already, and its source, were made with the same settings and files."""
    if config.optim.mode == "graph" and device.type != "cuda":
        raise L2TError(f"--mode graph needs a CUDA device, not {device}: leave it out.")
    column, of_source = folder / str(config.name), folder / "sources" / config.data.dataset
    for place, what, free in (
        (column, f"column {config.name}", _ROWS),
        (of_source, f"the source of {config.data.dataset}", (*_ROWS, *_OF_TARGETS)),
    ):
        if (place / "config.json").exists():
            saved = load_config(place / "config.json")
            ours = config if place == column else dataclasses.replace(config, target=saved.target)
            check_same(ours, saved, saved, what, (*FREE, *free))
    if (column / "inputs.json").exists():
        inputs = json.loads((column / "inputs.json").read_text())
        for name, print_ in fingerprints(config).items():
            if inputs.get(name, print_) != print_:
                raise L2TError(
                    f"column {config.name} was made with another --{name}: put that back, or give another --name."
                )


def write_settings(folder: Path, config: TrainConfig) -> None:
    """config.json and inputs.json of a column, with all rows that it ever had, and of its source."""
    column = folder / str(config.name)
    places = [column]
    if source_folders(config, column):
        places.append(folder / "sources" / config.data.dataset)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        path, full = place / "config.json", config
        if path.exists():
            saved = load_config(path)
            full = dataclasses.replace(
                config,
                method=ordered([*(saved.method or ()), *(config.method or ())], list(METHODS)),
                seeds=tuple(sorted({*(saved.seeds or ()), *(config.seeds or ())})),
            )
        save_config(full, path)
        if place == column:
            save_text(column / "inputs.json", json.dumps(fingerprints(full), indent=2) + "\n")


def write_problems(column: Path, config: TrainConfig, found: Problems) -> None:
    """problems.json: those found now, and those of methods that this command does not have."""
    path = column / "problems.json"
    before: Problems = json.loads(path.read_text()) if path.exists() else {}
    others = {name: of for name, of in before.items() if name not in (config.method or ())}
    save_text(path, json.dumps(others | found, indent=2) + "\n")


def ordered(names: Sequence[str], order: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in order if name in names)


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Of what the settings only point at, the SHA-256: weights of sources, split files; of a folder its place."""
    weights = [Path(name) for name in config.source.source_weights or () if name != "imagenet"]
    splits = [Path(f"{config.data.split}-{part}") for part in ("train", "val", "test")] if config.data.split else []
    found = {
        f"{kind} {i + 1}": hashlib.sha256(path.expanduser().read_bytes()).hexdigest()
        for kind, paths in (("source-weights", weights if uses_sources(config) else []), ("split", splits))
        for i, path in enumerate(paths)
    }
    if config.data.dataset == "folder":
        found["data-root"] = str(config.data.data_root.expanduser().resolve())
    return found
