"""The signals that ask a program to stop, and processes that are not to hear them."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = {number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None}


_asked = int(signal.SIGINT)


def note(number: int) -> None:
    """The signal that asked to stop."""
    global _asked
    _asked = number


def exit_code() -> int:
    """Of a program that was asked to stop and did, as shells count: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + _asked


@contextmanager
def held_back() -> Iterator[None]:
    """What asks to stop comes afterwards; processes that are started here begin without hearing it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group() -> None:
    """In a process that was started under `held_back`: what a terminal or a scheduler sends to a group of processes is
    not for this one, but for the one that started it, which may still end this one."""
    if not hasattr(os, "setpgid"):
        return
    os.setpgid(0, 0)
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # forgets what came before
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
