"""Two loops that take turns in one process, so that a machine that slows down slows both.

Owns the order of the turns and their clock, and measures nothing by itself. A loop is told to make steps; the second
may instead be a program that owns its pace and says where it has made a block of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 1  # blocks left out: optimizers make their state there, compilers compile

Loop = Callable[[int], object]
"""Makes so many optimizer steps."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two loops that took turns needed, block by block."""

    first: list[float]  # seconds a step
    second: list[float]

    @property
    def ratios(self) -> list[float]:
        """Second / first."""
        return [second / first for first, second in zip(self.first, self.second, strict=True)]

    @property
    def swapped(self) -> Comparison:
        return Comparison(first=self.second, second=self.first)


class Turns:
    """First, second, second, first: a turn of the first loop opens and closes each block of the second."""

    def __init__(self, first: Loop, *, turn: int, device: torch.device | None = None) -> None:
        """`turn` is in steps. The device is waited for wherever the clock is read."""
        self.block = 2 * turn
        self._first, self._turn, self._device = first, turn, device
        self._first_seconds: list[float] = []  # a block
        self._second_seconds: list[float] = []
        self._opening = 0.0  # seconds of the turn that opened this block
        self._started: float | None = None

    def switch(self) -> None:
        """The second loop calls this before its first block and after each."""
        now = self._now()
        if self._started is not None:
            self._second_seconds.append(now - self._started)
            self._first_seconds.append(self._opening + self._time_first())
        self._opening = self._time_first()
        self._started = self._now()

    def comparison(self) -> Comparison:
        return Comparison(
            first=[seconds / self.block for seconds in self._first_seconds[WARM_UP:]],
            second=[seconds / self.block for seconds in self._second_seconds[WARM_UP:]],
        )

    def _time_first(self) -> float:
        started = self._now()
        self._first(self._turn)
        return self._now() - started

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def in_turns(first: Loop, second: Loop, *, turn: int, blocks: int, device: torch.device | None = None) -> Comparison:
    """Both loops for `blocks` measured blocks of twice `turn` steps."""
    turns = Turns(first, turn=turn, device=device)
    turns.switch()
    for _ in range(WARM_UP + blocks):
        second(turns.block)
        turns.switch()
    return turns.comparison()
