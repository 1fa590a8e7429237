"""What this machine can do: the device, the number formats it is fast in, the cores to use, the memory there is."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch

from lmtrain.errors import HardwareError
from lmtrain.machine import available_cores

log = logging.getLogger(__name__)

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""The number format of activations; fp8 is one of matrix products alone."""

FP8_CAPABILITY = (9, 0)
"""Hopper. What torchao and torchtitan name for training in fp8 is an H100 or later."""

MIN_SPEEDUP = 1.15
"""What bf16 must gain on a CPU to be taken: less is within the noise of a short probe, and not worth its rounding."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""As `torch.cpu.get_capabilities` names them, on x86 and on Arm."""


def choose_device(wanted: str) -> torch.device:
    """The device of a run; `auto` takes CUDA, then MPS, then the CPU. Raises HardwareError if it is not there."""
    found = [
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
        "cpu",
    ]
    if wanted == "auto":
        return torch.device(found[0])
    if wanted not in found:
        raise HardwareError(f"device={wanted} is not available to PyTorch here; available: {', '.join(found)}")
    return torch.device(wanted)


def require_format(wanted: str, device: torch.device) -> None:
    """Raise HardwareError for a number format that the device cannot train in."""
    if wanted == "fp16" and device.type != "cuda":
        raise HardwareError(f"precision=fp16 needs a CUDA device, this run is on {device.type}; use fp32 or bf16")
    if wanted == "fp8":
        _require_fp8(device)


def _require_fp8(device: torch.device) -> None:
    needs = "precision=fp8 needs a GPU of Hopper or later (compute capability 9.0)"
    if device.type != "cuda":
        raise HardwareError(f"{needs}, this run is on {device.type}; use precision=bf16")
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        name, (major, minor) = torch.cuda.get_device_name(device), capability
        raise HardwareError(f"{needs}, {name} has {major}.{minor}; use precision=bf16")
    if importlib.util.find_spec("torchao") is None:
        raise HardwareError("precision=fp8 needs torchao: pip install 'lmtrain[fp8]', or use precision=bf16")


def choose_format(wanted: str, device: torch.device, probe: Callable[[], float]) -> tuple[torch.dtype, str]:
    """The number format of matrix products, and why `auto` chose it (empty if it was asked for by name).

    `auto` is bf16 on Ampere and later, fp16 on Volta and Turing, else fp32. On a CPU with bf16 instructions it asks
    `probe` how many times as fast as fp32 the model is in bf16: such CPUs may be slower in it, with small models above
    all.
    """
    if wanted != "auto":
        return FORMATS[wanted], ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        chosen = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
        return chosen, f"the GPU has compute capability {major}.{minor}"
    if device.type != "cpu":
        return torch.float32, f"nothing else is tried on {device.type}"
    if not has_bf16_instructions():
        return torch.float32, "this CPU has no bf16 instructions"
    speedup = probe()
    chosen = torch.bfloat16 if speedup >= MIN_SPEEDUP else torch.float32
    return chosen, f"bf16 is {speedup:.2f}× as fast on this CPU, and taken from {MIN_SPEEDUP}× on"


def pads_vocab(wanted: bool | Literal["auto"], device: torch.device, format: torch.dtype) -> bool:
    """Whether logits are computed at a padded width; `auto`: on GPUs in 16 bits.

    A row of 50,257 of them begins anywhere, and tensor cores load blocks at multiples of 16 bytes. A CPU does not mind,
    and pays for the copies.
    """
    return device.type == "cuda" and format != torch.float32 if wanted == "auto" else wanted


def has_bf16_instructions() -> bool:
    """Whether the CPU multiplies bf16 numbers itself."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in BF16_INSTRUCTIONS)


def set_threads(wanted: int | Literal["auto"] | None, *, processes: int = 1) -> int:
    """Set the CPU threads of this process to `wanted`, or to its share of the cores, and return them.

    `auto` asks the environment before; what a run makes of it beyond that is in `threads.py`.
    """
    cores = available_cores()
    asked = threads_of_environment() if wanted == "auto" and processes == 1 else None
    threads = wanted if isinstance(wanted, int) else asked or max(1, cores // processes)
    if isinstance(wanted, int) and wanted > cores:
        log.warning("parallel.num_threads=%d on %d cores: threads will wait for each other", wanted, cores)
    torch.set_num_threads(threads)
    return threads


class CoresLeft:
    """What of the cores was there for this process while entered, as other programs left it."""

    def __enter__(self) -> CoresLeft:
        self._began, self._idle, self._own = time.perf_counter(), _idle_seconds(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._there = time.process_time() - self._own + _idle_seconds() - self._idle

    def share(self, cores: int) -> float:
        """Of so many cores, used or idle, between 0 and 1."""
        return min(1.0, self._there / (cores * self.seconds))


def _idle_seconds() -> float:
    """Of the cores this process may run on, since the machine started."""
    import psutil

    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    times = dict(enumerate(psutil.cpu_times(percpu=True)))
    return sum(times[core].idle for core in (affinity(0) if affinity else times) if core in times)


def threads_of_environment() -> int | None:
    """What OMP_NUM_THREADS asks for, as users and batch systems set it; None: nothing."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one number for each level of nesting
    return int(asked) if asked.isdecimal() and int(asked) > 0 else None


def keep_freed_memory() -> None:
    """Let the C library keep what tensors leave for those of the next step.

    glibc would give it back to the system, which clears the same pages again for every step: two thousand page faults
    in that of a small model. Tensors above 8 MiB come and go one by one, or what they leave would be gaps. Other C
    libraries are left as they are.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 8 * 2**20)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def total_memory(device: torch.device) -> float:
    """Bytes of the device's memory, whatever other programs use of it now.

    Of a CPU: main memory, as far as the limits of this process and of its control groups let it be used.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    import psutil

    limits = [*(limit for limit, _ in _control_groups()), *_addresses_left()]
    return max(0.0, min([float(psutil.virtual_memory().total), *limits]))


def available_memory() -> float:
    """Bytes of main memory this process may still take.

    The least of what is free, what the process's limit on addresses (`ulimit -v`) leaves, and what the limits of its
    control groups (containers, batch systems) leave.
    """
    import psutil

    left = [*memory_left_in_control_groups(), *_addresses_left()]
    return max(0.0, min([float(psutil.virtual_memory().available), *left]))


def _addresses_left() -> Iterator[float]:
    """Bytes of addresses that this process may still take, if they are limited."""
    import psutil

    if sys.platform == "linux":
        process = psutil.Process()
        addresses, _ = process.rlimit(psutil.RLIMIT_AS)
        if addresses != psutil.RLIM_INFINITY:
            yield addresses - process.memory_info().vms


def memory_left_in_control_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[float]:
    """Bytes that each control group around this process may still take."""
    return (limit - used for limit, used in _control_groups(root, own))


def _control_groups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[float, float]]:
    """Bytes that each control group (version 2) around this process may take and has taken, but for cached files."""
    try:
        inside = next(line for line in own.read_text().splitlines() if line.startswith("0::")).removeprefix("0::/")
    except (OSError, StopIteration):
        return
    for folder in (root / inside, *(root / inside).parents):
        if not folder.is_relative_to(root):
            return
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text()) - _field(folder / "memory.stat", "inactive_file")
        except (OSError, LookupError):
            continue
        if limit != "max":
            yield int(limit), used


def _field(path: Path, name: str) -> int:
    """The number after `name` in a file of names and numbers. Raises LookupError, OSError."""
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(name)
