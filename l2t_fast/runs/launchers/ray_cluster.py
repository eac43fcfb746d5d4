"""Tasks of a Ray cluster: the one that `RAY_ADDRESS` or `ray start` names, or one of this machine alone.

Ray itself finds the place, with a GPU or a share of one, gives a task that was lost with its worker to another one
(three times), and hands over what `ray.cancel` asks for.
"""

import contextlib
import os
from typing import Any

from l2t_fast.errors import L2TError
from l2t_fast.runs.launchers.base import Task, carry_out_there


class OnRay:
    """The launcher "ray".

    Args:
        gpus: the share of a GPU that a task takes, 0 on a CPU.

    Raises:
        L2TError: Ray is not installed, or its cluster has no GPU.
    """

    def __init__(self, gpus: float) -> None:
        try:
            import ray as installed
            from ray.util.queue import Queue
        except ImportError:
            raise L2TError("--launcher ray needs Ray: pip install 'l2t-fast[ray]'.") from None
        ray: Any = installed
        if not ray.is_initialized():
            ray.init(include_dashboard=False)
        if gpus > ray.cluster_resources().get("GPU", 0):
            raise L2TError("the Ray cluster has no GPU: leave out --device cuda and --gpus-per-cell.")
        self._ray, self._gpus = ray, gpus
        self._told = Queue(actor_options={"num_cpus": 0})
        self._tasks: dict[Any, Task] = {}  # by what Ray gives for each

    def start(self, task: Task, threads: int) -> None:
        if threads > self._ray.cluster_resources().get("CPU", 0):
            raise L2TError(f"the Ray cluster has no {threads} CPUs for a cell: give fewer --threads.")
        there = self._ray.remote(_work).options(num_cpus=threads, num_gpus=self._gpus, name=task.title)
        self._tasks[there.remote(task, threads, os.getcwd(), self._told)] = task

    def events(self, seconds: float) -> list[tuple[Task, str, tuple[Any, ...]]]:
        ended, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=seconds)
        by_folder = {task.folder: task for task in self._tasks.values()}
        told = [
            (by_folder[folder], what, arguments)
            for folder, what, arguments in self._told.get_nowait_batch(self._told.qsize())
            if folder in by_folder
        ]
        return told + [(self._tasks.pop(there), *self._end_of(there)) for there in ended]

    def _end_of(self, there: Any) -> tuple[str, tuple[str]]:
        try:
            how, words = self._ray.get(there)
        except self._ray.exceptions.TaskCancelledError:
            return "stopped", ("",)
        except self._ray.exceptions.RayError as error:
            why = (str(error).strip().splitlines() or [""])[-1][:200]
            return "failed", (f"Ray gave it up ({type(error).__name__}: {why})",)
        return how, (words,)

    def stop(self) -> None:
        for there in self._tasks:
            self._ray.cancel(there)  # a KeyboardInterrupt, by the handler of SIGINT, which lets the training save

    def close(self, kill: bool) -> None:
        for there in self._tasks:
            self._ray.cancel(there, force=kill)
        self._tasks = {}


def _work(task: Task, threads: int, folder: str, told: Any) -> tuple[str, str]:
    """What a worker of Ray runs."""

    def tell(what: str, arguments: tuple[Any, ...]) -> None:
        with contextlib.suppress(Exception):  # who started it is gone, and this worker ends soon
            told.put_nowait((task.folder, what, arguments))

    return carry_out_there(task, threads, folder, tell)
