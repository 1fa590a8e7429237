"""What the latest steps came to, left on the device until numbers are needed, so that no step waits for it.

When to read is the trainer's.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass

import torch

from lmtrain.training.step import StepOutcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadOutcome:
    """A step's outcome as numbers."""

    step: int  # from 1
    has_targets: bool
    loss: float
    grad_norm: float
    applied: bool
    overflow: bool

    def tell_dropped(self, run_name: str) -> None:
        """Warn, with the command that shows what the step trained on."""
        log.warning(
            "step %d: loss %.4g, gradient norm %.4g: not finite, nothing was updated; its text: "
            "lmtrain data inspect %s --step %d",
            self.step,
            self.loss,
            self.grad_norm,
            shlex.quote(run_name),
            self.step,
        )


class UnreadOutcomes:
    """Outcomes in the order of their steps."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, bool, StepOutcome]] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def reading_waits(self) -> bool:
        """Whether the device is still at work on what would be read."""
        return any(outcome.loss.is_cuda for _, _, outcome in self._steps[-1:])

    def add(self, step: int, has_targets: bool, outcome: StepOutcome) -> None:
        self._steps.append((step, has_targets, outcome))

    def read(self) -> list[ReadOutcome]:
        """All since the last time, in one copy from the device, which this waits for."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        tensors = [value for _, _, o in steps for value in (o.loss, o.grad_norm, o.applied, o.overflow)]
        rows = torch.stack(tensors).view(-1, 4).tolist()
        return [
            ReadOutcome(step, has_targets, loss, grad_norm, applied=bool(applied), overflow=bool(overflow))
            for (step, has_targets, _), (loss, grad_norm, applied, overflow) in zip(steps, rows, strict=True)
        ]
