"""Ramps of a run's first steps: batches that grow in sequences, sequences that grow in tokens.

Owns the arithmetic: how large a step is and what came before it, as functions of the step. Which tokens a step
holds is in `batches.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """From `initial` at step 0 to the full size at step `steps`."""

    initial: int
    steps: int


class BatchSizes:
    """Sequences of every step: growing evenly along a ramp, `full` after it."""

    def __init__(self, full: int, ramp: Ramp | None = None) -> None:
        self.full = full
        sizes: list[int] = []
        if ramp is not None:
            sizes = [ramp.initial + (full - ramp.initial) * step // ramp.steps for step in range(ramp.steps)]
        self._before = np.cumsum([0, *sizes])  # sequences before each step up to the first full one

    def before(self, step: int) -> int:
        """Sequences of all steps before this one."""
        on_ramp = min(step, len(self._before) - 1)
        return int(self._before[on_ramp]) + (step - on_ramp) * self.full

    def steps_for(self, sequences: int) -> int:
        """The smallest number of steps that hold so many sequences."""
        beyond = sequences - int(self._before[-1])
        if beyond <= 0:
            return int(np.searchsorted(self._before, sequences))
        return len(self._before) - 1 - (-beyond // self.full)


def sequence_length(step: int, full: int, ramp: Ramp | None) -> int:
    """Tokens a sequence at a step: doubling along the ramp, each length for as many steps, `full` after it.

    `full` is the initial length times a power of two.
    """
    if ramp is None or step >= ramp.steps:
        return full
    doublings = (full // ramp.initial).bit_length() - 1
    return ramp.initial << (step * doublings // ramp.steps)
