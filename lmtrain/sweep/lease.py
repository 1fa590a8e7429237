"""Who works on a trial, and whether that process is still alive.

On the same machine the answer is exact (process, its start, boot). Another machine's process is taken for dead when it
has not renewed its lease for a while.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

RENEW_SECONDS = 60.0
RENEW_OFTEN_SECONDS = 2.0  # where the storage is written to anyway
DEAD_AFTER_SECONDS = 300.0
"""A lease of another machine, not renewed for so long, is void."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A process that has claimed a trial."""

    host: str
    boot: str  # this start of the machine
    processes: str  # what the process number counts in: containers have their own
    pid: int
    started: float  # of the process, seconds since the epoch
    worker: int  # which of the workers of one command
    begun: float  # of the claim, seconds since the epoch
    renewed: float

    @classmethod
    def of_this_process(cls, worker: int) -> Lease:
        """A new lease, now."""
        now = time.time()
        process = psutil.Process()
        return cls(
            host=platform.node(),
            boot=_boot_id(),
            processes=_process_namespace(),
            pid=process.pid,
            started=process.create_time(),
            worker=worker,
            begun=now,
            renewed=now,
        )

    @property
    def age(self) -> float:
        """Seconds since it was renewed."""
        return time.time() - self.renewed

    def renewed_now(self) -> Lease:
        """The same lease, just renewed."""
        return replace(self, renewed=time.time())

    def as_dict(self) -> dict[str, Any]:
        """For the storage."""
        return asdict(self)

    def is_of_this_process(self) -> bool:
        """Whether it is ours."""
        return self.pid == os.getpid() and self.is_of_this_machine() and self._is_process(psutil.Process())

    def is_dead(self) -> bool:
        """Whether nobody works on the trial any more."""
        if self.host == platform.node() and self.boot != _boot_id():
            return True  # the machine was started again
        if not self.is_of_this_machine():
            return self.age > DEAD_AFTER_SECONDS
        try:
            process = psutil.Process(self.pid)
            return not self._is_process(process) or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def is_of_this_machine(self) -> bool:
        """Whether its process number means something here."""
        return (self.host, self.boot, self.processes) == (platform.node(), _boot_id(), _process_namespace())

    def _is_process(self, process: psutil.Process) -> bool:
        # Process numbers are used again. The start is worked out from a clock that may have been set in between.
        return bool(abs(process.create_time() - self.started) < 2.0)


@contextlib.contextmanager
def keep_renewing(renew: Callable[[], None]) -> Iterator[None]:
    """Call `renew` every RENEW_SECONDS from a thread while entered; a failure is tried again at the next turn."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # a storage that is away now may be back then
                renew()

    thread = threading.Thread(target=work, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _boot_id() -> str:
    linux = Path("/proc/sys/kernel/random/boot_id")
    return linux.read_text().strip() if linux.exists() else str(round(psutil.boot_time()))


def _process_namespace() -> str:
    linux = Path("/proc/self/ns/pid")
    return str(linux.readlink()) if linux.exists() else ""
