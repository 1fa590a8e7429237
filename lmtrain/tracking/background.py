"""The thread that keeps a slow or absent tracking server away from training.

Owns the queue between a run and a mirror: gathering records, waiting out a server that is away, the bounded
end. Knows no server: what is written where belongs to the mirror.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lmtrain.tracking.metrics_file import METRICS_FILE
from lmtrain.tracking.tracker import RunInfo

GATHER_SECONDS = 2.0  # records that come within this time go out together
RETRY_SECONDS = 20.0  # pause before a server that is away is asked again
MAX_QUEUED = 10_000  # messages kept for a server that is away; further records are dropped
_log = logging.getLogger(__name__)


class Mirror(Protocol):
    """One run on a server, written to directly: every method waits for the server and may raise."""

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        """Send records. Must bear being asked to send the same ones again."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Send a file."""

    def finish(self, status: str, summary: Mapping[str, Any], end_time: float) -> None:
        """End the run; `end_time` in seconds since the epoch."""


class BackgroundTracker:
    """Mirrors one run from a thread of its own; every method but `finish` returns at once.

    A server that is away is asked again until the run ends. What it refuses for good switches the mirror off.
    Either way there is one warning, and nothing is raised.
    """

    def __init__(
        self,
        *,
        server: str,
        open_mirror: Callable[[RunInfo, float], Mirror],
        is_transient: Callable[[Exception], bool],
        close_timeout: float,
    ) -> None:
        """
        Args:
            server: how warnings name it.
            open_mirror: makes the mirror from the run and its start time (seconds since the epoch).
            is_transient: whether what raised the error may succeed later.
            close_timeout: seconds `finish` waits at most.
        """
        self._server = server
        self._open_mirror = open_mirror
        self._is_transient = is_transient
        self._close_timeout = close_timeout
        self._mirror: Mirror  # set and used by the thread alone
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()  # records, jobs, None at the end
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False

    def start(self, info: RunInfo) -> None:
        arguments = (info, time.time())
        self._thread = threading.Thread(target=self._work, args=arguments, name="tracker", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, float]) -> None:
        if self._messages.qsize() < MAX_QUEUED:
            self._messages.put(record)
        else:
            self._warn("is too slow for the records of this run")

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self._messages.put(lambda: self._mirror.log_artifact(path, folder))

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        if self._thread is None:
            return
        end_time = time.time()
        self._messages.put(lambda: self._mirror.finish(status, summary, end_time))
        self._messages.put(None)
        self._closing.set()
        self._thread.join(self._close_timeout)
        if self._thread.is_alive():
            self._warn(f"did not take everything within {self._close_timeout:g} s")

    def _work(self, info: RunInfo, start_time: float) -> None:
        """The thread: open the mirror, then send what comes until the end or until it cannot be used."""

        def open_mirror() -> None:
            self._mirror = self._open_mirror(info, start_time)

        usable = self._deliver(open_mirror)
        while usable:
            messages = [self._messages.get()]
            self._closing.wait(GATHER_SECONDS)
            while not self._messages.empty():
                messages.append(self._messages.get())
            for job in self._jobs(messages):
                if job is None or not self._deliver(job):
                    return

    def _jobs(self, messages: list[Any]) -> Iterator[Callable[[], None] | None]:
        """The same messages in the same order, neighbouring records made one job."""
        for are_records, group in itertools.groupby(messages, lambda message: isinstance(message, Mapping)):
            if are_records:
                yield self._log_job(list(group))
            else:
                yield from group

    def _log_job(self, records: list[Mapping[str, float]]) -> Callable[[], None]:
        return lambda: self._mirror.log(records)

    def _deliver(self, job: Callable[[], None]) -> bool:
        """Do the job, waiting out a server that is away. Returns whether to go on."""
        while True:
            last_try = self._closing.is_set()
            try:
                job()
                return True
            except Exception as error:
                self._warn(f"cannot be used ({one_line(error)})")
                if last_try or not self._is_transient(error):
                    return False
            self._closing.wait(RETRY_SECONDS)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s %s; the run goes on, %s has everything", self._server, what, METRICS_FILE)


def one_line(error: BaseException) -> str:
    """An error as part of a log line; of a chain of errors, what the operating system said."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{type(cause).__name__}: {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:159] + "…"
