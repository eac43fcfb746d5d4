"""One run: source networks, then methods x seeds on one target, a table and pictures, in one folder.

runs/NAME/config.json                       the settings, all of them
          source/                           the training of the source, where there was one
          METHOD/seed-K/                    a cell, as `cell.py` has it
          table.md, table.csv, ...          what came out
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from l2t_fast.errors import L2TError, MachineError
from l2t_fast.files import check_there, make_folder
from l2t_fast.ranks import current, joined, started_again
from l2t_fast.reports.column import Problems, read_column
from l2t_fast.reports.table import write_tables
from l2t_fast.runs.build import find_device
from l2t_fast.runs.folder import write_problems
from l2t_fast.runs.launchers.base import at_work
from l2t_fast.runs.lock import alone, begun, check_free
from l2t_fast.runs.machine import note_machine
from l2t_fast.runs.preflight import list_skipped, preflight
from l2t_fast.runs.progress import Display, MakeWatch, StopSignal, TrainingWatch
from l2t_fast.runs.tasks import CellTask, column_tasks
from l2t_fast.settings.defaults import check_name, resolve
from l2t_fast.settings.options import TrainConfig
from l2t_fast.settings.stored import check_same, load_config, save_config, updated


def run(config: TrainConfig, console: Console, given: Collection[str] = (), callbacks: Sequence[object] = ()) -> Path:
    """Trains what `config` asks for, on all ranks that torchrun has started, and returns the folder of the run.

    Args:
        callbacks: are told of the training of each cell: `training.watch.Callback`s, or loggers as Lightning has them.
        given: names of the settings that are meant even where they are the usual ones; others than the usual always
            are. A run that goes on with other ones than its own is refused.

    Raises:
        Interrupted: stopped by the user, with everything saved.
        L2TError: bad settings, missing data, a folder that exists already, a training that diverged.
    """
    with joined(config.device) as ranks:
        folder, made, resume = opened(config, resolve, given=given)
        train(folder, made, console if ranks.leads else Console(quiet=True), resume, callbacks)
        return folder


def opened(
    config: TrainConfig,
    complete: Callable[[TrainConfig], TrainConfig],
    flags: Mapping[str, str] | None = None,
    given: Collection[str] = (),
) -> tuple[Path, TrainConfig, bool]:
    """What `open_run` gives, on all ranks, and whether the run goes on: as it does where torchrun begins it again."""

    def on_first() -> tuple[Path, TrainConfig, bool]:
        asked = config
        if config.name is not None and started_again() and begun(config.runs / config.name):
            asked = dataclasses.replace(config, resume=True)
        return *open_run(asked, complete, flags, given), asked.resume

    if config.name is None and current().count > 1:
        raise L2TError("several processes train one run: give it a --name, by which it goes on when one of them fails.")
    return current().first(on_first)


def open_run(
    config: TrainConfig,
    complete: Callable[[TrainConfig], TrainConfig],
    flags: Mapping[str, str] | None = None,
    given: Collection[str] = (),
) -> tuple[Path, TrainConfig]:
    """The folder of the run, and its complete settings: of a new one, or of the one that goes on.

    Args:
        complete: fills in what a new run's settings leave out.
        flags: what the command calls those settings that it calls otherwise than `train`.
        given: as for `run`.

    Raises:
        L2TError: the folder exists already, or there is none to resume, or it was made with other settings.
    """
    if config.name is not None:
        check_name(config.name)
        check_free(config.runs / config.name)
    if not config.resume:
        name = config.name or f"{config.data.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = config.runs / name
        _check_new(folder)
        return folder, complete(dataclasses.replace(config, name=name))
    if config.name is None:
        made = [path.parent for path in config.runs.glob("*/config.json")]
        if not made:
            raise L2TError(f"there is no run under {config.runs} to resume: start one without --resume.")
        folder = max(made, key=lambda path: (path / "config.json").stat().st_mtime)
    else:
        folder = config.runs / config.name
        if not folder.exists():
            raise L2TError(f"there is no run folder {folder} to resume: start it without --resume.")
        if not begun(folder):
            raise L2TError(f"nothing was begun in {folder}: start it without --resume.")
    check_free(folder)
    saved = load_config(folder / "config.json")
    check_same(config, saved, TrainConfig(), flags=flags, given=given)
    return folder, updated(saved, config, TrainConfig(), given)


def _check_new(folder: Path) -> None:
    if begun(folder):
        raise L2TError(f"the run folder {folder} exists already: give another --name, or go on with it by --resume.")


def train(folder: Path, config: TrainConfig, console: Console, resume: bool, callbacks: Sequence[object] = ()) -> None:
    """Trains, one after the other, what is not done yet; writes the table and the pictures.

    A cell that fails, because its loss became infinite, does not keep the others from being trained.

    Raises:
        L2TError: as `run`; another process works in the folder.
    """
    device, ranks = find_device(config.device), current()
    for error in ranks.first(lambda: preflight(config, device, console)).values():
        raise error
    with contextlib.ExitStack() as held:

        def hold() -> None:
            make_folder(folder)
            held.enter_context(alone(folder))
            if not resume:
                _check_new(folder)  # another command may have begun it, and ended, since `open_run` looked
            save_config(config, folder / "config.json")
            note_machine(folder, device)
            list_skipped(folder, config)

        ranks.first(hold)
        _train(folder, config, device, console, callbacks)


def _train(
    folder: Path, config: TrainConfig, device: torch.device, console: Console, callbacks: Sequence[object]
) -> None:
    methods = config.method or ()
    console.print(Text.assemble("folder of the run: ", (str(folder), "bold")), soft_wrap=True)
    sources, cells = column_tasks(folder, folder, config, methods, device)
    with Display(console) as display, StopSignal().listening(console) as stop:
        make_watch = functools.partial(TrainingWatch, display, stop)
        for source in sources:
            with at_work(source, lambda: stop.asked):
                source.run(make_watch)
        found = [(cell, _failure(cell, make_watch, stop, callbacks)) for cell in cells]
    failed = [(cell, why) for cell, why in found if why is not None]
    if current().leads:
        _report(folder, config, console, failed)
    if failed:
        (cell, why), more = failed[0], len(failed) - 1
        others = f" ({more} more failed: the table says why)" if more else ""
        raise L2TError(f"{cell.method}, seed {cell.seed}: {why}{others}")


def _report(folder: Path, config: TrainConfig, console: Console, failed: Sequence[tuple[CellTask, str]]) -> None:
    """The table and the pictures."""
    check_there(folder / "config.json")
    problems: Problems = {}
    for cell, why in failed:
        problems.setdefault(cell.method, {})[str(cell.seed)] = why
    write_problems(folder, config, problems)
    column = read_column(folder, config, problems)
    for table in write_tables(folder, column.title, [column], config.method or ()):
        console.print(table)
    console.print(f"table, curves and pictures are in {folder}", highlight=False, soft_wrap=True, markup=False)


def _failure(cell: CellTask, make_watch: MakeWatch, stop: StopSignal, callbacks: Sequence[object]) -> str | None:
    """Trains a cell, and says why it failed, if it did: it diverged, say. The others are trained all the same."""
    try:
        with at_work(cell, lambda: stop.asked):
            cell.run(make_watch, callbacks)
    except MachineError:
        raise
    except L2TError as error:
        if current().count > 1:  # others may not have failed
            raise
        return str(error)
    return None
