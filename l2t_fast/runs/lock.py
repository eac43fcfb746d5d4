"""One process at a time in a folder: the lock that every command and every training takes there."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

from l2t_fast.errors import Interrupted, L2TError
from l2t_fast.files import writing

LOCK = ".lock"
_LOOK_EVERY = 0.2  # seconds between two looks at a lock that another process holds
_ENDING = 10.0  # seconds in which the children of a holder that was killed end, too


@contextlib.contextmanager
def alone(folder: Path, stopped: Callable[[], bool] | None = None) -> Iterator[None]:
    """Holds `folder`, and writes into its lock file who does; the system frees it when the holder ends, however.

    Args:
        stopped: given, another holder is waited for until it says so: of a table that was killed, a worker may still
            be saving. Without it another holder is an error.

    Raises:
        Interrupted: `stopped()` said so while waiting.
        L2TError: another process holds the folder, or its lock is no file: what a link leads to would be overwritten.
        MachineError: the lock file cannot be written.
    """
    path, until = folder / LOCK, monotonic() + _ENDING
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise L2TError(f"{path} is not the lock of a run, but a link or another thing: remove it.")
    with contextlib.ExitStack() as stack:
        with writing(path):
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
        while not _take(file):
            if stopped is not None and stopped():
                raise Interrupted
            holder = _read(file)
            if stopped is None and (monotonic() > until or (holder and not _has_ended(holder))):
                who = "another process"
                if holder:
                    who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')},"
                raise L2TError(f"{who} works in {folder}: wait for it, or give another --name.")
            sleep(_LOOK_EVERY)
        with writing(path):
            since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
            file.flush()
        yield


def check_free(folder: Path) -> None:
    """Raises L2TError where another process holds the folder; makes nothing."""
    if (folder / LOCK).exists():
        with alone(folder):
            pass


def begun(folder: Path) -> bool:
    """Whether there is more in the folder than what a command that was killed at its very start leaves.

    Raises:
        L2TError: it is a file.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise L2TError(f"{folder} is a file, not the folder of a run: give another --name or --runs.")
    return any(
        begun(path) if path.is_dir() else path.name != LOCK and path.suffix != ".part" for path in folder.iterdir()
    )


def _take(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _read(file: IO[str]) -> dict[str, Any]:
    """Who holds the lock; empty where it is not written yet."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder was killed, here: a child that it forked, and that has the lock from it, ends soon."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
