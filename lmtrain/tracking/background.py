"""The thread that keeps a slow or absent tracking server away from training.

Owns the queue between a run and a mirror: gathering records, waiting out a server that is away, the bounded
end. Knows no server: what is written where belongs to the mirror.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_when_event_set,
    wait_exponential_jitter,
)

from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import METRICS_FILE, read_metrics
from lmtrain.tracking.run_info import RunInfo

GATHER_SECONDS = 2.0  # records that come within this time go out together
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 1.0, 60.0  # pauses before a server that is away is asked again
MAX_QUEUED = 10_000  # records kept for a server that is away; those beyond are read from the metrics file later
SILENCE = 0.005  # of the time of a run, that its end waits for a request without an answer
SHORTEST_SILENCE = 0.5  # seconds
log = logging.getLogger(__name__)


def one_line(error: BaseException) -> str:
    """An error as part of a log line; of a chain of errors, what the operating system said."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{type(cause).__name__}: {cause.strerror}"
        cause = cause.__cause__ or cause.__context__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:159] + "…"


class Mirror(Protocol):
    """One run on a server, written to directly: every method waits for the server and may raise.

    Opened anew, it has taken what the run folder holds of the past.
    """

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        """Send records. Must bear being asked to send the same ones again."""

    def finish(self) -> None:
        """Send what else the run folder holds, and end the run as it says it ended."""


class Request:
    """Knows since when a server has owed an answer, so that the end of a run need not wait for one that is silent."""

    def __init__(self) -> None:
        self.since: float | None = None  # `time.monotonic`; None: nothing is asked

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While entered, a server is being asked."""
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None


def wait_for(thread: threading.Thread, request: Request, *, patience: float, timeout: float) -> str:
    """Wait until a thread that talks to a server has ended, and say so if it is not worth waiting any longer.

    Args:
        patience: seconds that a request of the thread may go without an answer.
        timeout: seconds in all.

    Returns:
        What the server failed to do; empty if the thread has ended.
    """
    deadline = time.monotonic() + timeout
    while thread.is_alive():
        thread.join(0.02)
        now, asked = time.monotonic(), request.since
        if asked is not None and now - asked > patience:
            return "does not answer"
        if now > deadline:
            return f"did not take everything within {timeout:g} s"
    return ""


class BackgroundTracker:
    """Mirrors one run from a thread of its own; every method but `finish` returns at once.

    A server that is away is asked again until the run ends. What it refuses for good switches the mirror off.
    Either way there is one warning, and nothing is raised.
    """

    def __init__(
        self,
        *,
        server: str,
        open_mirror: Callable[[RunInfo, Request], Mirror],
        is_transient: Callable[[BaseException], bool],
        explain: Callable[[BaseException], str] = one_line,
        close_timeout: float,
        remedy: str = "",
        abandon: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            server: how warnings name it.
            open_mirror: makes the mirror of a run. A mirror of a distant server says when it is waiting for it.
            is_transient: whether what raised the error may succeed later.
            explain: an error in a line, for the warning.
            close_timeout: seconds `finish` waits at most.
            remedy: what puts right later what could not be mirrored, for the warning; `RUN` stands for the run folder.
            abandon: called when the end of the run does not wait for the server any longer.
        """
        self._server = server
        self._open_mirror = open_mirror
        self._is_transient = is_transient
        self._explain = explain
        self._close_timeout = close_timeout
        self._remedy = remedy
        self._abandon = abandon
        self._mirror: Mirror  # set and used by the thread alone
        self._messages: queue.Queue[Any] = queue.Queue(MAX_QUEUED)  # records; None: the run has ended
        self._overflowed = threading.Event()
        self._closing = threading.Event()
        self._request = Request()
        self._thread: threading.Thread | None = None
        self._warned = False

    def start(self, info: RunInfo) -> None:
        self._info = info
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, float]) -> None:
        try:
            self._messages.put_nowait(record)
        except queue.Full:
            self._overflowed.set()

    def finish(self) -> None:
        if self._thread is None:
            return
        self._closing.set()
        self.log(None)  # type: ignore[arg-type]  # wakes the thread
        patience = max(SHORTEST_SILENCE, SILENCE * (time.monotonic() - self._began))
        problem = wait_for(self._thread, self._request, patience=patience, timeout=self._close_timeout)
        if problem:
            self._warn(problem)
            self._abandon()

    def _work(self) -> None:
        """The thread: open the mirror, then send what comes until the end or until it cannot be used."""

        def open_mirror() -> None:
            self._mirror = self._open_mirror(self._info, self._request)

        usable = self._deliver(open_mirror)
        while usable:
            messages = [self._messages.get()]
            self._closing.wait(GATHER_SECONDS)
            while not self._messages.empty():
                messages.append(self._messages.get_nowait())
            ended = self._closing.is_set() and self._messages.empty()
            usable = self._send([message for message in messages if message is not None])
            if ended:
                if usable:
                    self._deliver(self._mirror.finish)
                return

    def _send(self, records: list[Mapping[str, float]]) -> bool:
        """Send records, and when the queue could not hold them all, those of the file. Returns whether to go on."""
        if self._overflowed.is_set():
            self._overflowed.clear()
            records = [*read_metrics(self._info.folder / METRICS_FILE)]
        return not records or self._deliver(lambda: self._mirror.log(records))

    def _deliver(self, job: Callable[[], None]) -> bool:
        """Do the job, waiting out a server that is away. Returns whether to go on."""
        attempts = Retrying(
            retry=retry_if_exception(self._is_transient),
            wait=wait_exponential_jitter(initial=FIRST_RETRY_SECONDS, max=LONGEST_RETRY_SECONDS),
            stop=stop_when_event_set(self._closing),
            sleep=sleep_using_event(self._closing),  # the end of the run brings the last try forward
            before_sleep=self._warn_of,
            reraise=True,
        )
        try:
            attempts(job)
        except Exception as error:
            self._warn(f"cannot be used ({self._explain(error)})")
            return False
        return True

    def _warn_of(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        self._warn(f"cannot be used ({self._explain(error)})")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            remedy = self._remedy.replace("RUN", str(RunDir(self._info.folder)))
            log.warning("%s %s; the run goes on, %s has everything%s", self._server, what, METRICS_FILE, remedy)
