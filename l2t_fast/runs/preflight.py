"""What can be wrong with a run, found before a folder is made or anything is trained."""

import dataclasses
from pathlib import Path

import torch
from rich.console import Console

from l2t_fast.data.splits import load_data
from l2t_fast.errors import L2TError, UnfitError
from l2t_fast.files import save_text
from l2t_fast.runs.build import (
    build_sources,
    check_data,
    describe,
    make_engine,
    make_learner,
    method_config,
    source_data,
    trains_sources,
)
from l2t_fast.runs.made import layers
from l2t_fast.runs.progress import Display, StopSignal, TrainingWatch
from l2t_fast.runs.tensorboard import check_tensorboard
from l2t_fast.settings.options import TrainConfig
from l2t_fast.training.export import check_export

SKIPPED = "skipped-images.txt"
_IN_A_LINE = str.maketrans({"\n": r"\n", "\r": r"\r"})


def list_skipped(folder: Path, config: TrainConfig) -> None:
    """Writes which images of the data set are left out, a path a line, where the run leaves out any."""
    if config.data.on_bad_image == "skip":
        skipped = load_data(config.data, (config.seeds or (0,))[0]).skipped
        save_text(folder / SKIPPED, "".join(f"{path.translate(_IN_A_LINE)}\n" for path in skipped))


def preflight(config: TrainConfig, device: torch.device, console: Console) -> dict[str, UnfitError]:
    """Builds all that the run will train, and says a line of each method; returns those that the networks do not suit.

    The networks are built on the CPU: the processes that train may be others, and need the whole `device`.

    Raises:
        L2TError: data, weights, layers or settings that cannot be had.
    """
    optim = config.optim
    if "tensorboard" in config.log:
        check_tensorboard()
    if optim.mode == "graph" and device.type != "cuda":
        raise L2TError(f"--mode graph needs a CUDA device, not {device}: leave it out.")
    with Display(console) as display:
        watch = TrainingWatch(display, StopSignal(), "checking", 1, 0)
        try:
            return _look(config, device, console, watch)
        finally:
            watch.clear()


def _look(config: TrainConfig, device: torch.device, console: Console, watch: TrainingWatch) -> dict[str, UnfitError]:
    seed = (config.seeds or (0,))[0]
    eager = dataclasses.replace(config, optim=dataclasses.replace(config.optim, mode="eager"))
    watch.preparing("reading the images")
    data = load_data(config.data, seed)
    if data.skipped:
        left_out = f"{len(data.skipped)} images cannot be read and are left out; {SKIPPED} lists them"
        _say(console, f"{config.data.dataset}: {left_out}")
    sources = build_sources(config)
    if trains_sources(config):
        source_data(config)
    unfit: dict[str, UnfitError] = {}
    tried = False
    for method in config.method or ():
        try:
            target, learner, start = make_learner(
                config, method, seed, sources, data, torch.device("cpu"), watch.preparing
            )
            watch.preparing("examining the networks")
            engine = make_engine(method_config(eager, method), learner, lambda text: None)
        except UnfitError as error:
            unfit[method] = error
            continue
        check_data(engine, config, data)
        if not tried:  # the targets of all methods are alike
            tried = True
            check_export(target, config.export, torch.zeros(2, *data.image_shape))
        _say(console, f"{describe(config, method, data, learner, start)}; {device}")
        if learner.uses_sources:
            _say(console, f"  {layers(learner)['layers']}")
    return unfit


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
