"""A process of its own for MLflow, whose import and tables take seconds of Python that a run would wait for.

Owns the process, and what goes to and fro: the thread that mirrors a run asks, one thing at a time, and waits for the
answer outside the interpreter's lock. What is done there belongs to `mirror.py`. The process ends with the one that
started it, is started again if it died, and serves all runs that one process makes, one after the other.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lmtrain.config.schema import TrackingConfig
from lmtrain.tracking.background import Mirror, Request

if TYPE_CHECKING:
    from lmtrain.tracking.run_info import RunInfo
    from lmtrain.tracking.tracker import ModelWriter

NICENESS = 10
"""Training goes first."""

_START = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from lmtrain.tracking.mlflow.process import answer_questions; answer_questions()"
)

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Meant for the run, also where a batch system sends them to all processes."""


class MlflowError(Exception):
    """What MLflow raised there: in a line, and whether the same may succeed later."""

    def __init__(self, explanation: str, *, transient: bool) -> None:
        super().__init__(explanation)
        self.transient = transient


class MlflowProcess:
    """The process, from outside."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._asking = threading.Lock()
        apart = None if sys.platform == "win32" else 0  # a Ctrl-C is for the run
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=apart
        )
        self._send(sys.path)

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def ask(self, request: Request, question: str, *arguments: Any) -> None:
        """Have something done, and wait for it; `request` is told while a server is waited for. Raises MlflowError."""
        with self._asking:
            try:
                self._send((question, arguments))
                while True:
                    kind, content = pickle.load(self._answers)
                    match kind:
                        case "done":
                            return
                        case "failed":
                            raise MlflowError(content["explanation"], transient=content["transient"])
                        case "waiting":
                            request.since = time.monotonic() if content else None
                        case "log":
                            logging.getLogger(content["name"]).log(content["level"], "%s", content["message"])
            except (OSError, EOFError, pickle.UnpicklingError) as error:
                raise MlflowError("its process has ended", transient=False) from error
            finally:
                request.since = None

    def end(self) -> None:
        """Kill it."""
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()

    def _send(self, content: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(content))
        self._process.stdin.flush()

    @property
    def _answers(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout


_process: MlflowProcess | None = None
_starting = threading.Lock()


def mlflow_process() -> MlflowProcess:
    """The process that serves this one, started if there is none; it makes itself ready meanwhile."""
    global _process
    with _starting:
        if _process is None or not _process.usable:
            _process = MlflowProcess()
        return _process


def end_mlflow_process() -> None:
    """End it, whatever it is waiting for; who asks next has it started again."""
    if _process is not None:
        _process.end()


atexit.register(end_mlflow_process)


class DistantMirror(Mirror):
    """`MlflowMirror` in that process."""

    def __init__(
        self, config: TrackingConfig, write_model: ModelWriter | None, info: RunInfo, request: Request
    ) -> None:
        self._process, self._request = mlflow_process(), request
        writer = None if write_model is None else pickle.dumps(write_model)  # what it imports can wait
        self._process.ask(request, "open", dict(os.environ), str(Path.cwd()), config, writer, info)

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        self._process.ask(self._request, "log", [dict(record) for record in records])

    def finish(self) -> None:
        self._process.ask(self._request, "finish")


def answer_questions() -> None:
    """The process, from inside: until nobody can ask any more."""
    for name in _SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer

    sending = threading.Lock()  # threads of MLflow log as well

    def send(kind: str, content: Any = None) -> None:
        with sending:
            answers.write(pickle.dumps((kind, content)))
            answers.flush()

    logging.getLogger().addHandler(_Forwarding(send))
    with contextlib.suppress(BrokenPipeError):
        _answer(send)
    os._exit(0)  # nothing is left to be done, and MLflow takes its time


def _answer(send: Any) -> None:
    from lmtrain.tracking.mlflow.connection import explain_error, is_transient, prepare_mlflow
    from lmtrain.tracking.mlflow.mirror import MlflowMirror

    prepare_mlflow()
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # while nothing is asked yet
    mirror: MlflowMirror | None = None
    while True:
        try:
            question, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if question == "open":
                environment, folder, config, writer, info = arguments
                os.environ.clear()
                os.environ.update(environment)
                os.chdir(folder)
                write_model = None if writer is None else functools.partial(_write_model, writer)
                mirror = MlflowMirror(config, write_model, info, _ForwardingRequest(send))
            else:
                getattr(mirror, question)(*arguments)
        except Exception as error:
            send("failed", {"explanation": explain_error(error), "transient": is_transient(error)})
        else:
            send("done")


def _write_model(writer: bytes, run: Path, to: Path) -> None:
    pickle.loads(writer)(run, to)


class _ForwardingRequest(Request):
    """Tells whoever asked since when a server has owed an answer."""

    def __init__(self, send: Any) -> None:
        self._send = send

    @property
    def since(self) -> float | None:
        return None

    @since.setter
    def since(self, since: float | None) -> None:
        self._send("waiting", since is not None)


class _Forwarding(logging.Handler):
    """Log records of the process as those of whoever asked."""

    def __init__(self, send: Any) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", {"name": record.name, "level": record.levelno, "message": record.getMessage()})
