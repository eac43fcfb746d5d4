"""Processes that read images: those that are killed are replaced, and nothing is lost, doubled or changed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from l2t_fast.data.loading import load

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


class Deadly(Dataset[Any]):
    """Its numbers; who reads `deadly` for the first time is killed."""

    def __init__(self, notes: Path, deadly: int) -> None:
        self.notes, self.deadly = notes, deadly

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        if index == self.deadly:
            with self.notes.open("a") as file:
                file.write("x")
            if self.notes.read_text() == "x":
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(index)


def test_a_batch_whose_reader_is_killed_is_read_again(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    found = [batch.tolist() for batch in load(Deadly(tmp_path / "notes", 5), 2, 2)]
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert (tmp_path / "notes").read_text() == "xx"
    assert signal.getsignal(signal.SIGCHLD) is handler  # nothing raises where the program stands


def test_all_readers_killed_between_two_batches(tmp_path: Path) -> None:
    """One after the other, by their ids, as some schedulers do."""
    found = []
    for batch in load(Deadly(tmp_path / "notes", -1), 1, 2):
        found.append(batch.item())
        if len(found) == 2:
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGTERM)
    assert found == list(range(11))


@pytest.mark.skipif(
    multiprocessing.get_context().get_start_method() != "fork", reason="a worker is to have the patched locks"
)
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_reader_killed_while_it_holds_a_lock(nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th that it takes of all that it has in common with the program: that one never waits for it."""
    ours, taken, notes = os.getpid(), 0, tmp_path / "notes"
    make: Any = vars(SemLock)["_make_methods"]

    def dies(acquire: Any, *args: Any) -> Any:
        nonlocal taken
        has = acquire(*args)
        if has and os.getpid() != ours:
            taken += 1
            if taken == nth and not notes.exists():
                notes.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return has

    def make_methods(lock: Any) -> None:
        make(lock)
        lock.acquire = partial(dies, lock.acquire)

    enter = SemLock.__enter__
    monkeypatch.setattr(SemLock, "_make_methods", make_methods)
    monkeypatch.setattr(SemLock, "__enter__", lambda lock: dies(partial(enter, lock)))
    assert [batch.item() for batch in load(Deadly(tmp_path / "none", -1), 1, 1)] == list(range(11))
    assert notes.exists()
