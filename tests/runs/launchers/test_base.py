"""A task carried out in a process that is another's."""

import os
import signal
from pathlib import Path
from typing import Any

from l2t_fast.runs.launchers.base import carry_out_there
from tests.runs.launchers.shared import Breaks, Counts


class Told(Counts):
    """It is asked to stop, twice, in the middle."""

    def run(self, make_watch: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return super().run(make_watch)


def test_a_signal_stops_the_task_and_not_the_process(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    told: list[Any] = []
    assert carry_out_there(Told(tmp_path / "a"), 1, os.getcwd(), lambda *event: told.append(event)) == ("stopped", "")
    assert told[0] == ("made", ("counted", 1, 2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert carry_out_there(Counts(tmp_path / "b"), 1, os.getcwd(), lambda *event: None) == ("finished", "fine")


def test_what_goes_wrong_is_said(tmp_path: Path) -> None:
    how, words = carry_out_there(Breaks(tmp_path / "a"), 1, os.getcwd(), lambda *event: None)
    assert (how, words) == ("failed", f"ZeroDivisionError, see {tmp_path / 'a/error.txt'}")
    how, words = carry_out_there(Counts(tmp_path / "b"), 1, "/no/such/folder", lambda *event: None)
    assert how == "failed"
    assert "has no folder /no/such/folder: start the table where all machines have the same files" in words
