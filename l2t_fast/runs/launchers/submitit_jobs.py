"""Jobs of Slurm, submitted by submitit; or, with `cluster=local`, processes of this machine.

Submitit itself writes the scripts, looks how jobs stand, and has a job that runs out of time or is preempted begin
again; the training goes on from its last checkpoint. What a training tells is lines in the log of its job.
"""

import contextlib
import functools
import json
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

from l2t_fast.errors import L2TError, first_line
from l2t_fast.runs.launchers.base import Task, carry_out_there

_MARK = "l2t-fast: "  # before what a training tells
_MINUTES = 24 * 60  # of a job, where the user does not say


class Submitit:
    """The launcher "submitit".

    Args:
        folder: for scripts and logs.
        gpus: of a job, 0 on a CPU.
        options: of submitit, each NAME=VALUE: slurm_partition=gpu, timeout_min=600, mem_gb=16, cluster=local.

    Raises:
        L2TError: submitit is not installed, or does not know an option.
    """

    def __init__(self, folder: Path, gpus: int, options: tuple[str, ...]) -> None:
        try:
            import submitit
        except ImportError:
            raise L2TError("--launcher submitit needs submitit: pip install 'l2t-fast[submitit]'.") from None
        given = dict(map(_option, options))
        self._local = given.get("cluster") == "local"
        cluster = given.pop("cluster", None)

        def executor(folder: Path) -> Any:
            made = submitit.AutoExecutor(folder.resolve(), cluster=cluster)
            made.update_parameters(
                **{"name": "l2t-fast", "timeout_min": _MINUTES, "gpus_per_node": gpus or None, **given}
            )
            return made

        try:
            with TemporaryDirectory() as scrap:  # what is refused leaves no folder behind
                executor(Path(scrap))
        except (AssertionError, NameError, RuntimeError, ValueError) as error:
            first = first_line(error)
            raise L2TError(f"--submitit {' '.join(options)} is refused ({first}): give submitit's options.") from None
        self._submitit = submitit
        self._executor = functools.cache(lambda: executor(folder))
        self._jobs: list[_Job] = []
        self._asked = False

    def start(self, task: Task, threads: int) -> None:
        self._executor().update_parameters(cpus_per_task=threads)
        # What the terminal sends to all processes is not for those of submitit's local executor.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            job = self._executor().submit(_Work(), task, threads, os.getcwd())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._jobs.append(_Job(task, job))

    def events(self, seconds: float) -> list[tuple[Task, str, tuple[Any, ...]]]:
        sleep(seconds)
        found: list[tuple[Task, str, tuple[Any, ...]]] = []
        for job in list(self._jobs):
            ended = job.handle.done()  # first: nothing is told afterwards
            found += [(job.task, what, tuple(arguments)) for what, arguments in job.told()]
            if ended:
                self._jobs.remove(job)
                found.append((job.task, *self._end_of(job.handle)))
        return found

    def _end_of(self, handle: Any) -> tuple[str, tuple[str]]:
        log = f"see {handle.paths.stderr}"
        if self._asked and not handle.paths.result_pickle.exists():  # it had not begun
            return "stopped", ("",)
        try:
            how, words = handle.result()
        except self._submitit.core.utils.UncompletedJobError:
            return "lost", (f"its job {handle.job_id} ended without a result, {log}",)
        except Exception as error:  # what the job raised before the training began
            return "failed", (f"its job {handle.job_id} failed ({type(error).__name__}), {log}",)
        return how, (words,)

    def stop(self) -> None:
        self._asked = True
        for job in self._jobs:
            if self._local:
                # A job of the local executor is a process that hands SIGTERM on; `cancel` would not let it save.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(job.handle.job_id), signal.SIGTERM)
            else:
                job.handle.cancel(check=False)  # scancel: SIGTERM, which lets it save

    def close(self, kill: bool) -> None:
        self.stop()
        self._jobs, self._asked = [], False


class _Job:
    """A job, and how far its log has been read."""

    def __init__(self, task: Task, handle: Any) -> None:
        self.task, self.handle, self._read = task, handle, 0

    def told(self) -> list[Any]:
        """[what, arguments] of each line that is new, and whole."""
        path: Path = self.handle.paths.stdout
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = whole.decode(errors="replace").splitlines()
        return [json.loads(line.removeprefix(_MARK)) for line in lines if line.startswith(_MARK)]


class _Work:
    """What a job runs."""

    def __call__(self, task: Task, threads: int, folder: str) -> tuple[str, str]:
        return carry_out_there(task, threads, folder, _tell)

    def checkpoint(self, *arguments: Any) -> Any:
        """By submitit, where the job runs out of time or is preempted: it begins again with the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


def _tell(what: str, arguments: tuple[Any, ...]) -> None:
    print(_MARK + json.dumps([what, arguments]), flush=True)


def _option(text: str) -> tuple[str, Any]:
    """Of "mem_gb=16" the name and the value, a number where it is one."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise L2TError(f"--submitit {text} is no NAME=VALUE: give slurm_partition=gpu, say.")
    try:
        return name, json.loads(value) if value.lstrip("-")[:1].isdigit() else value
    except ValueError:
        return name, value
