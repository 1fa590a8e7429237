"""The places of a machine: which GPU, and how many cores, each of several processes takes. Starts no processes."""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from lmtrain.config.schema import ExperimentConfig
from lmtrain.machine import available_cores, visible_gpus

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """A machine divided among processes that one process has started."""

    number: int  # processes at once
    gpus: tuple[str, ...] = ()  # to be dealt, as CUDA_VISIBLE_DEVICES names them

    @classmethod
    def of_this_machine(cls, number: int) -> Places:
        """All that the process at hand may use, for so many."""
        return cls(number, tuple(visible_gpus()))

    @property
    def threads(self) -> int:
        """CPU threads of each process."""
        return max(1, available_cores() // self.number)

    @property
    def doubts(self) -> str | None:
        """What is to be told of more processes than GPUs."""
        if not 0 < len(self.gpus) < self.number:
            return None
        return f"{self.number} workers share {len(self.gpus)} GPU{'s' * (len(self.gpus) > 1)}, dealt in turn"

    def seat(self, config: ExperimentConfig) -> ExperimentConfig:
        """The settings of a run here: its share of the cores, if it asks for no number of threads.

        One alone shares with nobody: what `auto` comes to is then its own to find.
        """
        if config.parallel.asked_threads is not None or (self.number == 1 and config.parallel.num_threads == "auto"):
            return config
        return replace(config, parallel=replace(config.parallel, num_threads=self.threads))

    def take(self) -> None:
        """Leave this process the GPU of its place, for as long as it lives. To be called before CUDA is used.

        What CUDA_VISIBLE_DEVICES says when CUDA is first used is what a process has of it.
        """
        if self.number > 1 and self.gpus:
            number, _ = _taken(_folder(os.getppid()))
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]


ALONE = Places(1)


def share_this_machine(number: int) -> Places:
    """Divide what this process may use among `number` that it is going to start, or that it starts one by one."""
    places = Places.of_this_machine(number)
    if places.doubts is not None:
        log.info(places.doubts)
    # What they need to find their places.
    atexit.register(shutil.rmtree, _folder(os.getpid()), ignore_errors=True)
    return places


@functools.cache
def _taken(folder: Path) -> tuple[int, FileLock]:
    """The lowest number that no living process has taken, and what keeps it until this process ends.

    A pool gives its processes no numbers that last: those that die are replaced.
    """
    folder.mkdir(exist_ok=True)
    for number in itertools.count():
        lock = FileLock(folder / f"{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        return number, lock
    raise AssertionError


def _folder(parent: int) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"lmtrain-{user}-places-of-{parent}"
