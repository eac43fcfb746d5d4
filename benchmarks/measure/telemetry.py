"""What the GPU says of itself while it is measured, through NVML; where there is none, rows say so.

A row measured while clocks were held down ("throttled") is marked: its time is not the device's best.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.rows import Row

PERIOD = 0.05  # seconds between two looks

# Reasons that hold clocks down, by their names in NVML; idleness and clocks set by the user are none.
THROTTLES = {
    "power": "nvmlClocksThrottleReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "temperature (software)": "nvmlClocksThrottleReasonSwThermalSlowdown",
    "temperature (hardware)": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
}


class Telemetry:
    """Looks at one device; `absent` says why it cannot."""

    def __init__(self, device: torch.device, nvml: Any = None) -> None:
        """`nvml`: the module pynvml, or something like it."""
        self.absent = ""
        self._nvml: Any = nvml
        try:
            if nvml is None:
                if device.type != "cuda":
                    raise RuntimeError("the device is a CPU")
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._handle = self._find(device)
        except Exception as error:  # no driver, no permission, MIG: a row says so
            self.absent = f"no NVML: {error}"

    def _find(self, device: torch.device) -> Any:
        """By UUID: NVML does not know CUDA_VISIBLE_DEVICES."""
        if device.type != "cuda":
            return self._nvml.nvmlDeviceGetHandleByIndex(0)
        uuid = torch.cuda.get_device_properties(device).uuid
        return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    @contextmanager
    def watch(self, iterations: int = 0, images: int = 0) -> Iterator[Row]:
        """Fills the row it gives with what was seen meanwhile.

        With the number of iterations and images that the block goes through, which must end when the device is done:
        also joules of an iteration and images a joule.
        """
        row: Row = {}
        if self.absent:
            row["telemetry"] = self.absent
            yield row
            return
        seen: list[dict[str, Any]] = []
        failed: list[Exception] = []
        done = threading.Event()

        def look() -> None:
            try:
                seen.append(self._look())
                while not done.wait(PERIOD):
                    seen.append(self._look())
            except Exception as error:  # what NVML may raise; a row says so
                failed.append(error)

        thread = threading.Thread(target=look, daemon=True)
        before = self._energy()
        thread.start()
        try:
            yield row
        finally:
            after = self._energy()
            done.set()
            thread.join()
        if failed:
            row["telemetry"] = f"NVML failed: {failed[0]}"
            return
        throttled = sorted({reason for sample in seen for reason in sample["throttled"]})
        row["telemetry"] = {
            "sm_mhz_least": min(sample["sm_mhz"] for sample in seen),
            "sm_mhz_most": max(sample["sm_mhz"] for sample in seen),
            "memory_mhz": max(sample["memory_mhz"] for sample in seen),
            "celsius": max(sample["celsius"] for sample in seen),
            "watts": max(sample["watts"] for sample in seen),
            "memory_used_bytes": max(sample["memory_used_bytes"] for sample in seen),
        }
        row["throttled"] = throttled
        if iterations and before is not None and after is not None and after > before:
            joules = (after - before) / 1e3
            row |= {"joules_per_iteration": joules / iterations, "images_per_joule": images / joules}

    def _look(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "memory_used_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "throttled": [name for name, bit in THROTTLES.items() if reasons & getattr(nvml, bit)],
        }

    def _energy(self) -> int | None:
        """Millijoules since the driver was loaded; None where NVML does not say."""
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except Exception:  # a GPU that does not count them, a driver that is gone
            return None
