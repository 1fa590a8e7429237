"""What the machine does while a run trains: use of CPU, memory and GPUs, looked at by a thread of its own.

The samples go into the records of the metrics file, so that every mirror and plot has them. Named as MLflow names its
own, which its page on system metrics goes by.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Any

import psutil

FIRST_SECONDS = 1.0  # until the first look, so that short runs have one too


class SystemMetrics:
    """Samples while entered."""

    def __init__(self, every: float | None) -> None:
        """`every`: seconds between looks; None: there are none."""
        self._every = every
        self._ended = threading.Event()
        self._newest: dict[str, float] = {}
        self._thread = threading.Thread(target=self._watch, name="system-metrics", daemon=True)

    def __enter__(self) -> SystemMetrics:
        if self._every is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def newest(self) -> dict[str, float]:
        """The newest sample, if it was not asked for before: `system/…`."""
        sample, self._newest = self._newest, {}
        return sample

    def _watch(self) -> None:
        assert self._every is not None
        psutil.cpu_percent()  # the next call tells of the time since this one
        gpus = _gpus()
        pause = min(FIRST_SECONDS, self._every)
        while not self._ended.wait(pause):
            self._newest = _sample(gpus)
            pause = self._every


def _sample(gpus: list[Any]) -> dict[str, float]:
    memory = psutil.virtual_memory()
    sample = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": round(memory.used / 1e6, 1),
        "system/system_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
    }
    for number, gpu in enumerate(gpus):
        sample |= {f"system/gpu_{number}_{name}": value for name, value in _sample_gpu(gpu).items()}
    return sample


def _sample_gpu(gpu: Any) -> dict[str, float]:
    """Of one GPU, as far as it tells."""
    import pynvml

    sample: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
        sample["memory_usage_megabytes"] = round(memory.used / 1e6, 1)
        sample["memory_usage_percentage"] = round(100 * memory.used / memory.total, 1)
    with contextlib.suppress(pynvml.NVMLError):
        sample["utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
    with contextlib.suppress(pynvml.NVMLError):
        sample["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000
    return sample


def _gpus() -> list[Any]:
    """Handles of NVIDIA's GPUs; none without their driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
