"""Epochs of one training: schedule, metrics, validation, checkpoints."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from l2t_fast.data.images import ImageSet, Part
from l2t_fast.data.splits import Data
from l2t_fast.engine.engine import Engine
from l2t_fast.errors import DamagedFileError, Interrupted, L2TError, ReadError
from l2t_fast.files import check_room, keep_as, make_folder, save_checkpoint
from l2t_fast.learner.undisturbed import modes_kept
from l2t_fast.ranks import ALONE, Ranks, current
from l2t_fast.training.learned import pair_names
from l2t_fast.training.log import Log
from l2t_fast.training.state import State, begin_random, check_finite, checkpoint_content, load_best, restore, size_of
from l2t_fast.training.trackers import Together
from l2t_fast.training.watch import Training, Watch

_EVAL_BATCH = 250
_SAVE_EVERY = 10.0  # seconds between two checkpoints: a few hundred images take less time than a large network's file


@dataclass(frozen=True)
class Schedule:
    """Cosine annealing from `lr` to zero over the epochs (Loshchilov & Hutter 2017), stepped once an epoch."""

    epochs: int
    batch_size: int
    lr: float
    seed: int

    def lr_at(self, epoch: int) -> float:
        return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


def fit(
    folder: Path,
    engine: Engine,
    network: nn.Module,
    data: Data,
    schedule: Schedule,
    watch: Watch,
    made: Mapping[str, str] | None = None,
    callbacks: Sequence[object] = (),
    title: str = "",
) -> dict[str, Any]:
    """Trains `engine`, whose learner's target is `network`, and returns accuracies on the test set.

    Goes on from folder/last.pt where there is one, bit by bit as if it had never stopped (on CUDA as far as cuDNN's
    kernels give the same bits again). Writes metrics.jsonl (a line an iteration, a line an epoch), and last.pt with
    best.pt, the weights that were best by validation: after the first epoch, after later ones when ten seconds have
    passed since, at the end and when stopped. before.pt is the last.pt before it: from there the training goes on where
    last.pt is damaged, and says so. `made` says what the training is made of: a checkpoint of another one is refused.
    `callbacks` are told of it under this `title`: each a `training.watch.Callback`, or a logger as Lightning has them.

    On several ranks (`ranks.current`) all call it, each takes its part of every batch, and rank 0 alone writes.

    Raises:
        Interrupted: `watch.stop_asked()`; all is saved.
        ReadError: images cannot be read; all is saved, but on several ranks, which go on from the last checkpoint.
        L2TError: a loss, a parameter or a buffer is not finite (says where; the last good checkpoint stays), a
            damaged or foreign checkpoint, too few images for a batch.
        MachineError: there is no room for the checkpoints; or the disk is full later: what was saved before stays, and
            the training goes on from there.
    """
    ranks = current()
    ranks.first(lambda: make_folder(folder))
    part = Part(ranks.rank, ranks.count, ranks.count * engine.accumulate)
    batches = data.train.num_batches(schedule.batch_size, part.parts)
    if batches == 0:
        raise L2TError(f"{len(data.train)} training images are too few: BatchNorm needs batches of two or more.")
    last, before = folder / "last.pt", folder / "before.pt"
    settings = made or {}
    made = {**settings, "parts of a batch": str(part.parts)}
    ranks.first(lambda: check_room(folder, 3 * size_of(engine)))  # last.pt and before.pt, and the next one or best.pt
    begin_random(ranks)
    state = _restored(last, before, engine, made, watch, ranks)
    if state.epoch > schedule.epochs or state.iteration > batches:
        raise L2TError(f"checkpoint {last} is of a longer training: put back its settings, or give another --name.")
    if state.epoch or state.iteration:
        watch.resumed(state.epoch, state.iteration)
    told = Together(callbacks if ranks.leads else ())

    def tell(row: dict[str, Any]) -> None:
        metrics = dict(row)
        told.on_iteration(engine, metrics.pop("epoch"), metrics.pop("iteration"), metrics)

    at = state.epoch, state.iteration
    logs = [Log(folder / "metrics.jsonl", at, last, engine.learner.pairs, tell)] if ranks.leads else []
    names = pair_names(engine.learner)
    told.on_start(Training(title, folder, engine, names, data, schedule.epochs, batches, *at, settings))

    best: dict[str, Tensor] = {}  # weights that are not in best.pt yet
    saved = -math.inf

    def save() -> None:
        nonlocal saved
        check_finite(engine, state, last)
        content = checkpoint_content(engine, state, made, ranks)

        def write() -> None:
            for log in logs:
                log.sync()
            if best:
                save_checkpoint(folder / "best.pt", {"weights": best, "epoch": state.best_epoch, "made": dict(made)})
            keep_as(last, before)
            save_checkpoint(last, content)

        ranks.first(write)
        best.clear()
        saved = perf_counter()

    start = perf_counter() - state.seconds
    try:
        while state.epoch < schedule.epochs:
            engine.lr = schedule.lr_at(state.epoch)
            for x, y, val in _inputs(engine, data, schedule, state, part):
                metrics = engine.step(x, y, val)
                for log in logs:
                    log.add(state.epoch, state.iteration, metrics, engine.lr)
                state.iteration += 1
                state.seconds = perf_counter() - start
                watch.iteration(state.epoch, metrics)
                if watch.stop_asked():
                    raise Interrupted
            row = ranks.first(lambda: logs[0].summary(state.epoch))
            if len(data.val):
                watch.evaluating("validation")
                row["val_accuracy"] = evaluate(network, data.val, watch.stop_asked, ranks)
                if row["val_accuracy"] > state.best_accuracy:
                    check_finite(engine, state, last)
                    state.best_accuracy, state.best_epoch = row["val_accuracy"], state.epoch
                    best.update(_weights(network))
            state.epoch, state.iteration = state.epoch + 1, 0
            for log in logs:  # first: a line without its checkpoint is dropped on resuming, the reverse would be missed
                log.write(row)
            told.on_epoch(row)
            if ranks.first(lambda: perf_counter() - saved) >= _SAVE_EVERY or state.epoch == schedule.epochs:
                save()
            watch.epoch(row)
        result = _test(folder, network, data, state, watch, made, ranks)
    except (Interrupted, ReadError) as stopped:
        for log in logs:
            log.flush()
        if isinstance(stopped, ReadError) and ranks.count > 1:  # the others are in the midst of an iteration
            raise
        save()
        if isinstance(stopped, ReadError):
            watch.say(f"{last} holds what was learned until an image could not be read\n")
        raise
    finally:
        told.on_end()
    full, rest = divmod(len(data.train), schedule.batch_size)
    images = full * schedule.batch_size + (rest if full < batches else 0)  # of an epoch
    counts = {"iterations": batches * schedule.epochs, "images": images * schedule.epochs}
    return {**result, "seconds": round(state.seconds, 3), **counts}


def _restored(last: Path, before: Path, engine: Engine, made: Mapping[str, str], watch: Watch, ranks: Ranks) -> State:
    """Where last.pt has the training, or before.pt, if that is damaged; or the start."""
    has_last, has_before = ranks.first(lambda: (last.exists(), before.exists()))
    if not has_last and not has_before:
        return State()
    try:
        return restore(last, engine, made, watch, ranks)
    except DamagedFileError:
        if not has_before:
            raise
        state = restore(before, engine, made, watch, ranks)
        watch.say(f"{last} is {'damaged' if has_last else 'missing'}: going on from the checkpoint before it\n")
        return state


@torch.no_grad()
def evaluate(
    network: nn.Module, images: ImageSet, stop_asked: Callable[[], bool] = lambda: False, ranks: Ranks = ALONE
) -> float:
    """Accuracy of `network` in evaluation mode, a fraction of `images`; each rank looks at some of them.

    Raises:
        Interrupted: `stop_asked()` said so; several ranks look at all first.
    """
    device = next(network.parameters()).device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    mine = images
    if ranks.count > 1:
        indices = torch.arange(ranks.rank, len(images), ranks.count, device=images.labels.device)
        mine = images.select(indices, images.labels[indices], augment=False)
    with modes_kept(network):
        network.eval()
        for x, y in mine.eval_batches(_EVAL_BATCH):
            correct += (network(x).argmax(1) == y).sum()
            if ranks.count == 1 and stop_asked():
                raise Interrupted
    total = ranks.total(int(correct.item()))
    if ranks.count > 1 and stop_asked():
        raise Interrupted
    return total / len(images)


def _test(
    folder: Path, network: nn.Module, data: Data, state: State, watch: Watch, made: Mapping[str, str], ranks: Ranks
) -> dict[str, Any]:
    """Test accuracy of the last weights, and of the best by validation; the network keeps the last ones."""
    watch.evaluating("test")
    result = {"test_accuracy_last": evaluate(network, data.test, watch.stop_asked, ranks)}
    if state.best_epoch >= 0:
        last = _weights(network)
        best = ranks.first(lambda: load_best(folder / "best.pt", network, made, state.best_epoch))
        network.load_state_dict(best)
        try:
            result["test_accuracy_best"] = evaluate(network, data.test, watch.stop_asked, ranks)
        finally:
            network.load_state_dict(last)
        result |= {"val_accuracy_best": state.best_accuracy, "best_epoch": state.best_epoch}
    return result


def _inputs(
    engine: Engine, data: Data, schedule: Schedule, state: State, part: Part
) -> Iterator[tuple[Any, Any, tuple[Tensor, Tensor] | None]]:
    """What `Engine.step` takes, from where the epoch stands to its end."""

    def stream(images: ImageSet, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from images.batches(schedule.batch_size, seed=schedule.seed, epoch=epoch, start=start, part=part)
        for later in itertools.count(epoch + 1):
            yield from images.batches(schedule.batch_size, seed=schedule.seed, epoch=later, part=part)

    batches = data.train.num_batches(schedule.batch_size, part.parts)
    if not engine.needs_val:
        remaining = data.train.batches(
            schedule.batch_size, seed=schedule.seed, epoch=state.epoch, start=state.iteration, part=part
        )
        yield from ((x, y, None) for x, y in remaining)
        return
    # "simulation": the real step on a batch, T simulated ones on it and those that follow, L_meta on held-out images.
    held_out = data.val.num_batches(schedule.batch_size, part.parts)
    train = stream(data.train, state.epoch, state.iteration)
    val = stream(data.val, *divmod(state.epoch * batches + state.iteration, held_out))
    window: deque[tuple[Tensor, Tensor]] = deque(maxlen=max(1, engine.inner_steps))
    window.extend(itertools.islice(train, (window.maxlen or 1) - 1))
    for _ in range(state.iteration, batches):
        window.append(next(train))
        xs, ys = zip(*window, strict=True)
        yield xs, ys, next(val)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
