"""Mixed precision: where autocast applies and when gradients are scaled."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The number format of the forward pass; weights, gradients and optimizer state stay fp32."""

    device: torch.device
    format: torch.dtype

    @property
    def name(self) -> str:
        """The format in short, as in the config."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.format]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.format == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.format)

    def gradient_scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scaling, active for fp16 only: its gradients would underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.format == torch.float16)
