"""How much of the machine a run uses: model FLOP utilisation and memory.

Counts nothing per layer and measures no loss; FLOPs per token are those of `model/sizing.py`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import time
from pathlib import Path
from types import TracebackType

import torch

# Peak dense TFLOP/s by the makers' data sheets: 16-bit tensor cores with fp32 accumulation, TF32, fp32 without them.
# Sheets that give figures "with sparsity" are halved. None: the card has no such units.
PEAKS: dict[str, tuple[float, float | None, float]] = {
    "B200": (2250, 1100, 75),
    "GH200": (989.5, 494.7, 67),
    "H200 NVL": (835.5, 417.8, 60),
    "H200": (989.5, 494.7, 67),
    "H100 NVL": (835.5, 417.8, 60),
    "H100 PCIe": (756.5, 378, 51),
    "H100": (989.5, 494.7, 67),
    "A100": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165, 82, 10.3),
    "A10": (125, 62.5, 31.2),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 6000 Ada": (364.2, 182.1, 91.1),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "V100-SXM2": (125, None, 15.7),
    "V100-PCIE": (112, None, 14),
    "T4": (65, None, 8.1),
}
OTHER_CARDS = re.compile(r"\b(MIG|Laptop|Ti|SUPER|D)\b")
"""Words that make a card slower or faster than the one its name begins with."""


class Utilisation:
    """What a record says of the hardware, from the speed since the one before."""

    def __init__(self, device: torch.device, *, flops_per_token: float, peak_flops: float | None) -> None:
        """`peak_flops` is in FLOP/s; None: unknown, and so is the share used of it.

        `flops_per_token` is that at the full sequence length, so shorter sequences of a ramp count a little too much.
        """
        self.device = device
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of the run before, in a multirun

    def __call__(self, tokens_per_second: float) -> dict[str, float]:
        """`train/mfu` as a fraction, if the peak is known, and `train/memory_gib`."""
        share = {"train/mfu": self.flops_per_token * tokens_per_second / self.peak_flops} if self.peak_flops else {}
        return share | {"train/memory_gib": memory_bytes(self.device) / 2**30}


def memory_bytes(device: torch.device) -> int:
    """CUDA: the most that tensors have taken. Elsewhere: the resident size of the process, all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: only the highest size so far is told, on macOS in bytes
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import resource

    return pages * resource.getpagesize()


class PeakBytes:
    """Watches a device's memory while entered: `peak`, the most bytes this process has held of it.

    On CUDA what PyTorch has reserved, without the context; else resident memory, which on systems other than Linux may
    have been as high before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = 0.0

    def __enter__(self) -> PeakBytes:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.peak = float(torch.cuda.max_memory_reserved(self._device))
            return
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            most = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        self.peak = float(most)


def peak_flops(device: torch.device, format: torch.dtype) -> float | None:
    """The peak of matrix products in FLOP/s by the data sheet of the card; None if it is not a known one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return listed_peak(name, "16-bit" if format != torch.float32 else "tf32" if tf32 else "fp32")


def listed_peak(name: str, kind: str) -> float | None:
    """The peak of a card, as CUDA names it, in FLOP/s. `kind` is 16-bit, tf32 or fp32."""
    known = next((card for card in PEAKS if re.search(rf"\b{card}\b", name)), None)
    if known is None or OTHER_CARDS.search(name):
        return None
    half, tf32, single = PEAKS[known]
    return {"16-bit": half, "tf32": tf32 or single, "fp32": single}[kind] * 1e12


@functools.cache
def measured_peak(device: torch.device, format: torch.dtype, num_threads: int) -> float:
    """The best of a few large matrix products, in FLOP/s: for hardware without a data sheet, once a process.

    Takes about a tenth of a second on a CPU and no random numbers. `num_threads` are those that PyTorch uses: another
    number is another measurement.
    """
    width, repeats = (1024, 6) if device.type == "cpu" else (4096, 10)
    matrix = torch.full((width, width), 1.0 / width, device=device, dtype=format)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading a value waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * width**3 / best
