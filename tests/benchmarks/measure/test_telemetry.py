"""What a GPU says of itself, by a GPU made up here."""

from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure.telemetry import THROTTLES, Telemetry
from benchmarks.report.columns import notes

CPU = torch.device("cpu")


def fake_nvml(reasons: int = 0) -> Any:
    """A GPU of 250 W that has used 100 J more at each look."""
    energy = iter(range(0, 10**9, 100_000))
    bits = {name: 1 << i for i, name in enumerate(THROTTLES.values())}
    return SimpleNamespace(
        **bits,
        NVMLError=RuntimeError,
        NVML_CLOCK_SM=0,
        NVML_CLOCK_MEM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: reasons,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1980 - kind,
        nvmlDeviceGetTemperature=lambda handle, sensor: 60,
        nvmlDeviceGetPowerUsage=lambda handle: 250_000,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=2**30),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(energy),
    )


def test_telemetry() -> None:
    with Telemetry(CPU, fake_nvml()).watch(iterations=10, images=500) as row:
        assert row == {}
    assert row["joules_per_iteration"] == 10
    assert row["images_per_joule"] == 5
    assert row["telemetry"]["watts"] == 250
    assert row["throttled"] == []
    assert notes(row) == ""


def test_throttling_marks_the_row() -> None:
    with Telemetry(CPU, fake_nvml(reasons=1)).watch() as row:
        pass
    assert row["throttled"] == ["power"]
    assert notes(row) == "**throttled: power**"


def test_nvml_that_fails_meanwhile_is_said() -> None:
    def lost(*_: Any) -> Any:
        raise RuntimeError("GPU is lost")

    nvml = fake_nvml()
    telemetry = Telemetry(CPU, nvml)
    nvml.nvmlDeviceGetClockInfo = nvml.nvmlDeviceGetTotalEnergyConsumption = lost
    with telemetry.watch(iterations=10, images=500) as row:
        pass
    assert row == {"telemetry": "NVML failed: GPU is lost"}


def test_absent_nvml_is_said() -> None:
    def fails() -> None:
        raise RuntimeError("Driver Not Loaded")

    for telemetry in (Telemetry(CPU), Telemetry(CPU, SimpleNamespace(nvmlInit=fails))):
        with telemetry.watch(1, 1) as row:
            pass
        assert set(row) == {"telemetry"}
        assert row["telemetry"].startswith("no NVML: ")
