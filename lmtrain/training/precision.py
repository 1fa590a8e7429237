"""Mixed precision: where autocast applies and when gradients are scaled."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lmtrain.data.batches import Batch
from lmtrain.training.losses import sum_loss

PROBE_SECONDS = 0.06
"""A probe goes on until it has taken so long. One round is always made, which a large model takes longer for."""


@dataclass(frozen=True)
class Precision:
    """The number format of the forward pass; weights, gradients and optimizer state stay fp32."""

    device: torch.device
    format: torch.dtype
    reason: str = ""  # why `auto` chose it; empty if it was asked for
    fp8: bool = False  # matrix products of the blocks are in 8 bits (`fp8`), everything else in `format`

    @property
    def name(self) -> Literal["fp32", "bf16", "fp16", "fp8"]:
        """The format in short, as in the config."""
        return "fp8" if self.fp8 else self.surrounding

    @property
    def surrounding(self) -> Literal["fp32", "bf16", "fp16"]:
        """The format of activations, which their memory follows from."""
        return "fp32" if self.format == torch.float32 else "bf16" if self.format == torch.bfloat16 else "fp16"

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.format == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.format)

    def set_tf32(self, wanted: bool | Literal["auto"]) -> None:
        """Whether what stays in fp32 on a GPU may be multiplied in TF32, for this process; `auto`: beside 16 bits only.

        Who asked for fp32 gets it.
        """
        allowed = self.format != torch.float32 if wanted == "auto" else wanted
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if allowed else "highest")

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scaling, active for fp16 only: its gradients would underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.format == torch.float16)


def bf16_speedup(model: nn.Module, batch: Batch) -> float:
    """How many times as fast as in fp32 forward and backward of `model` are in bf16 on a batch, on a CPU.

    The least of a few times each, in turns. Leaves no gradient, and the random numbers where they were. A compiled
    model is to be given uncompiled: compiling twice takes longer than a wrong choice costs.
    """
    # bf16 goes first, so that what only a first pass pays for never speaks for it.
    least = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        while True:
            for format in least:
                least[format] = min(least[format], _time_pass(model, batch, Precision(batch.inputs.device, format)))
            if time.perf_counter() - began >= PROBE_SECONDS:
                return least[torch.float32] / least[torch.bfloat16]


def _time_pass(model: nn.Module, batch: Batch, precision: Precision) -> float:
    """Seconds of forward and backward."""
    began = time.perf_counter()
    with precision.autocast():
        loss = sum_loss(model(batch.inputs, **batch.context), batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds
