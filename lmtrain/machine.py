"""What the operating system gives this process, found without importing torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPU cores this process may use: by its affinity, and by what its control groups (containers) let it have.

    More threads than that wait for each other.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root, own))]))


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """Cores' worth of time that each control group (version 2) around this process may take, where it is limited."""
    try:
        inside = next(line for line in own.read_text().splitlines() if line.startswith("0::")).removeprefix("0::/")
    except (OSError, StopIteration):
        return
    for folder in (root / inside, *(root / inside).parents):
        if not folder.is_relative_to(root):
            return
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        except (OSError, ValueError):  # the root has none; "max": no limit
            continue


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs this process may use, as CUDA_VISIBLE_DEVICES names them: by index, UUID, or MIG instance."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    names = []
    for name in map(str.strip, visible.split(",")):
        if not name or name.startswith("-") or name == "NoDevFiles":  # CUDA sees nothing from here on
            break
        names.append(name)
    return names


def count_gpus() -> int:
    """NVIDIA GPUs this process may use."""
    return len(visible_gpus())
