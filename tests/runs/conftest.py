"""What several tests of runs need."""

from functools import partial
from typing import Any

import pytest

from l2t_fast.errors import L2TError
from l2t_fast.runs import workers
from l2t_fast.runs.progress import Display, StopSignal, TrainingWatch


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process: what side by side means, other tests show."""

    def work_off(
        tasks: Any, jobs: int, threads: int, display: Display, stop: StopSignal, launcher: Any
    ) -> list[tuple[Any, str]]:
        failed = []
        for task in tasks:
            task.folder.mkdir(parents=True, exist_ok=True)
            try:
                task.run(partial(TrainingWatch, display, stop))
            except L2TError as error:
                failed.append((task, str(error)))
        return failed

    monkeypatch.setattr(workers, "work_off", work_off)
