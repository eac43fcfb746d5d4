"""Commands in processes of their own that need not load torch again: forked from one that has, and killed as planned.

Reads a command a line from stdin, `{"arguments": [...], "plan": {...}}`; writes the process id of each, and then its
exit code. A plan says at which call of a function, and how many seconds after it began, the process kills itself:
`{"phase": "saving", "call": 3, "after": 0.002}`; the phase "operation" counts what is done to files in `folder`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

PHASES = {"training": "engine.engine.Engine.step", "saving": "training.fit.save_checkpoint"}
PHASES |= {"validating": "training.fit.evaluate"}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.link", "os.truncate", "os.rmdir", "shutil.move"}


class Nursery:
    """The process that forks the commands, as a test sees it."""

    def __init__(self, log: Path) -> None:
        self._log = log
        here = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(log)]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=here)

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def start(self, arguments: list[str], **plan: Any) -> int:
        """Starts a command, and returns its process id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "plan": plan}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def ended(self) -> int:
        """Waits for the command, and returns its exit code."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def run(self, arguments: list[str], **plan: Any) -> int:
        self.start(arguments, **plan)
        return self.ended()

    def done(self, arguments: list[str], **plan: Any) -> dict[str, int]:
        """Runs a command that is to succeed; how often it was in each phase."""
        assert self.run(arguments, **plan) == 0, self._log.read_text()
        counts: dict[str, int] = json.loads(self._log.read_text().splitlines()[-1])
        return counts


def main(log: Path) -> None:
    import l2t_fast.runs.run
    import l2t_fast.runs.table
    import l2t_fast.training.fit

    l2t_fast.training.fit._SAVE_EVERY = 0.0  # after every epoch
    for line in sys.stdin:
        process = os.fork()
        if not process:
            _run(log, **json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _run(log: Path, arguments: list[str], plan: dict[str, Any]) -> None:
    from l2t_fast.cli import main

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(out, stream)
    counts: Counter[str] = Counter()
    code: Any = 0
    _watch(counts, plan)
    try:
        main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    print(json.dumps(counts), flush=True)
    os._exit(code)


def _watch(counts: Counter[str], plan: dict[str, Any]) -> None:
    def entered(phase: str) -> None:
        counts[phase] += 1
        if phase == plan.get("phase") and counts[phase] == plan["call"]:
            if not plan.get("after"):
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=_die, args=(plan["after"],), daemon=True).start()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) != 0
        if (writes or event in CHANGES) and any(str(path).startswith(plan["folder"]) for path in arguments):
            entered("operation")

    if "folder" in plan:
        sys.addaudithook(hook)
    for phase, place in PHASES.items():
        _wrap(place, lambda phase=phase: entered(phase))


def _wrap(place: str, before: Any) -> None:
    """Calls `before` whenever a function of the package is entered."""
    from pkgutil import resolve_name

    owner, _, name = place.rpartition(".")
    owner = resolve_name(f"l2t_fast.{owner}")
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **more: Any) -> Any:
        before()
        return function(*arguments, **more)

    setattr(owner, name, wrapped)


def _die(after: float) -> None:
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
