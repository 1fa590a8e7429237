"""What this machine can do: the device, the number formats it is fast in, the cores to use."""

from __future__ import annotations

import os

import torch

from lmtrain.errors import HardwareError


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


def choose_format(wanted: str, device: torch.device) -> torch.dtype:
    """The number format of matrix products.

    `auto` is bf16 on Ampere and later, fp16 on Volta and Turing, else fp32 (on CPUs bf16 often is slower: ask for
    it by name where it is not). Raises HardwareError for a format the device cannot train in.
    """
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    if wanted == "fp16" and device.type != "cuda":
        raise HardwareError(f"precision=fp16 needs a CUDA device, this run is on {device.type}; use fp32 or bf16")
    return formats[wanted]


def set_threads(wanted: int | None) -> int:
    """Set the CPU threads of this process to `wanted`, or to its share of the cores, and return them."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    threads = wanted or (len(affinity(0)) if affinity else os.cpu_count() or 1)
    torch.set_num_threads(threads)
    return threads
