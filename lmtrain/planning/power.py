"""What a device takes of electricity: by its limit, or by its own meter while something runs. Nothing is guessed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
"""Where Linux tells what processors may take and have taken (RAPL)."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """Of one device; of a CPU, all of its packages, whatever else runs there."""

    watts: float
    basis: str  # where that comes from


def power_limit(device: torch.device, powercap: Path = POWERCAP) -> Power | None:
    """The most that a device takes for long: NVML's limit of a GPU, RAPL's of a CPU; None if neither tells."""
    if device.type == "cuda":
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(_nvml_handle(device))  # mW
            return Power(watts=limit / 1000, basis="the GPU's power limit")
        return None
    if device.type == "cpu":
        limits = [_number(package / "constraint_0_power_limit_uw") for package in _packages(powercap)]
        if limits and None not in limits:
            watts = sum(limit for limit in limits if limit is not None) / 1e6
            return Power(watts=watts, basis="the processor's power limit") if watts else None
    return None


class EnergyMeter:
    """Measures while entered; `power` is then what the device took in the mean, or None if it has no meter to read."""

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self._joules = _meter(device, powercap)
        self.power: Power | None = None

    def __enter__(self) -> EnergyMeter:
        self._began, self._before = time.perf_counter(), self._joules()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, after = time.perf_counter() - self._began, self._joules()
        if self._before is not None and after is not None and after > self._before:  # a counter may have begun anew
            self.power = Power(watts=(after - self._before) / seconds, basis="measured by the device's own meter")


def _meter(device: torch.device, powercap: Path) -> Callable[[], float | None]:
    """A function that tells the joules taken since some moment, or None."""
    if device.type == "cuda":
        return lambda: _joules_of_gpu(device)
    return lambda: _joules_of_packages(powercap) if device.type == "cpu" else None


def _joules_of_gpu(device: torch.device) -> float | None:
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(_nvml_handle(device))) / 1000
    return None


def _joules_of_packages(powercap: Path) -> float | None:
    """Only root may read them on most systems."""
    taken = [_number(package / "energy_uj") for package in _packages(powercap)]
    return sum(one for one in taken if one is not None) / 1e6 if taken and None not in taken else None


def _packages(powercap: Path) -> list[Path]:
    """Folders of the processors; those of their parts have a second colon."""
    return sorted(folder for folder in powercap.glob("intel-rapl:*") if folder.name.count(":") == 1)


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def _nvml_handle(device: torch.device) -> Any:
    """NVML counts cards otherwise than CUDA does: found by the card's own id. Raises NVMLError."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
