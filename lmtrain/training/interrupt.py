"""Signals and the time limit as a request to stop after the step at hand, and what a batch system makes of it then."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What batch systems send some time before they end a job (`sbatch --signal`)."""

HEEDED = (signal.SIGINT, signal.SIGTERM, *WARNINGS)


class StopRequest:
    """While entered, the first SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 is remembered; a second SIGINT stops at once.

    A deadline (seconds since the epoch) that has passed counts as SIGTERM, which a cluster would send soon after. A
    request inside another takes its place, with what that was asked before. Outside the main thread signals cannot be
    handled, only the deadline counts.
    """

    def __init__(self, deadline: float | None = None, on_signal: Callable[[], None] | None = None) -> None:
        """`on_signal` is called at each signal, for those who have others to tell."""
        self._deadline = deadline
        self._on_signal = on_signal
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def signal(self) -> signal.Signals | None:
        """What asked to stop, if anything has."""
        if self._signal is None and self._deadline is not None and time.time() >= self._deadline:
            self._signal = signal.SIGTERM
        return self._signal

    def settle(self, agree: Callable[[int], int]) -> bool:
        """Whether to stop, as all processes of a run see it: `agree` gives the largest of the numbers they give."""
        number = agree(0 if self.signal is None else self.signal)
        if number and self._signal is None:
            self._signal = signal.Signals(number)
        return number != 0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in HEEDED:
                outer = getattr(signal.getsignal(number), "__self__", None)
                if isinstance(outer, StopRequest):  # it heard what came while this was being set up
                    self._signal = self._signal or outer._signal
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:  # nobody else has taken over
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        if self._on_signal is not None:
            self._on_signal()


def leave_to_batch_system(number: int) -> None:
    """Let submitit hear a signal that a run has heeded and saved itself for; not to come back if that ends the process.

    Its handler of the warning has Slurm queue the job again. After SIGTERM, Slurm decides that itself: the process ends
    without a result, which would say that its work is done.
    """
    if number in WARNINGS and callable(signal.getsignal(number)):
        signal.raise_signal(number)
    elif number == signal.SIGTERM and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        os._exit(128 + number)
