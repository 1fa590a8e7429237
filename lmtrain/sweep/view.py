"""A study while it runs: a live table on a terminal, a line for each trial that ends elsewhere.

Reads the study's storage from a thread of its own, and never disturbs who works on it: what goes wrong here is told
once and tried again. What is shown is in `tables`.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from lmtrain.run_dir import RunDir
from lmtrain.sweep.reading import ReadStudy, StudyReader, kind_of
from lmtrain.sweep.tables import results_table, running_table, standing, summary, trial_line
from lmtrain.sweep.terminal import output
from lmtrain.tracking.background import one_line

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_SHARE = 0.008
"""Of a core's time that looking may take; where a look takes long, because of many workers, there are fewer."""
LONGEST_LAST_LOOK_SECONDS = 10.0
"""How long the end waits for a storage that does not answer."""

_LINES_OF_NO_TRIAL = 8  # of the live table
_WORTH_A_LINE = ("failed", "infeasible", "diverged")  # where the table tells of the rest


class StudyView:
    """Shows a study while entered, and its trials by objective at the end."""

    def __init__(self, open_reader: Callable[[], StudyReader], *, min_workers: int = 0) -> None:
        """`open_reader` is called again and again until it does not raise.

        `min_workers`: how many there are at least, also while none has a trial.
        """
        self._open = open_reader
        self._min_workers = min_workers
        self._ran_before = 0  # trials at the last look
        self._reader: StudyReader | None = None
        self._study: ReadStudy | None = None
        self._told: set[int] | None = None  # trials whose end was told or came before; None: not looked yet
        self._is_blind = False
        self._console = Console(stderr=True)
        self._live = _Live(self._console) if sys.stderr.isatty() and not self._console.is_dumb_terminal else None
        self._leaving, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="study view", daemon=True)

    def __enter__(self) -> StudyView:
        if self._live is not None:
            self._live.start()
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join(LONGEST_LAST_LOOK_SECONDS)
        if self._live is not None:
            self._live.stop()
        if self._study is not None and kind is not KeyboardInterrupt:
            show_results(self._study)

    def wait(self) -> None:
        """Return when nothing runs any more, nor will."""
        self._over.wait()

    def _keep_looking(self) -> None:
        pause = POLL_SECONDS
        while not self._leaving.wait(pause):
            before = time.thread_time()
            self._look()
            pause = max(POLL_SECONDS, (time.thread_time() - before) / MAX_SHARE)
        self._look()  # for what has ended since

    def _look(self) -> None:
        try:
            if self._reader is None:
                self._reader = self._open()
            self._study = self._reader.read()
            self._show(self._study)
            self._is_blind = False
        except Exception as error:  # whatever it is, the study goes on
            if not self._is_blind:
                log.warning("the study cannot be shown for now, it goes on: %s", one_line(error))
            self._is_blind = True

    def _show(self, study: ReadStudy) -> None:
        # A worker between two trials counts.
        workers = max(self._min_workers, self._ran_before, len(study.running))
        self._ran_before = len(study.running)
        ended = {trial.number: trial for trial in study.ended}
        if self._told is None:
            if ended and self._live is None:
                self._print(summary(study, workers=workers))
        else:
            for number in sorted(ended.keys() - self._told):
                line = trial_line(study, ended[number])
                if self._live is None:
                    self._print(f"{line} · {standing(study, workers=workers)}")
                elif kind_of(ended[number]) in _WORTH_A_LINE:
                    self._print(line)
        self._told = set(ended)
        if self._live is not None:
            room = self._console.height - _LINES_OF_NO_TRIAL
            running = [running_table(study, width=self._console.width, max_rows=room)] if study.running else []
            self._live.update(Group(*running, Text(summary(study, workers=workers))), refresh=True)
        if study.is_over:
            self._over.set()

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def show_results(study: ReadStudy) -> None:
    """Print the trials that have ended, where the study stands and where it is."""
    console = output()
    if study.ended:
        console.print(results_table(study, width=console.width))
    console.print(Text(summary(study)), soft_wrap=True)
    console.print(Text(f"sweep folder {RunDir(study.folder)}"), soft_wrap=True)


class _Live(Live):
    """A live display that also takes what log handlers write that were there before it, and returns them at its end."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty())

    def start(self, refresh: bool = False) -> None:
        before = (sys.stdout, sys.stderr)
        super().start(refresh)
        proxies = dict(zip(map(id, before), (sys.stdout, sys.stderr), strict=True))
        for handler in _console_handlers():
            handler.setStream(proxies.get(id(handler.stream), handler.stream))

    def stop(self) -> None:
        super().stop()
        for handler in _console_handlers():  # also those made in between
            handler.setStream(getattr(handler.stream, "rich_proxied_file", handler.stream))


def _console_handlers() -> list[logging.StreamHandler[TextIO]]:
    return [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
