"""The face every tracker shows to a run, and the choice among them.

Owns the protocol and the guard that keeps a broken mirror away from training. A tracker only mirrors: the
metrics file decides what happened, and nothing here may stop or slow a run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmtrain.config.schema import MlflowConfig, NoTrackingConfig, TrackingConfig
from lmtrain.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a mirror is told about a run when it starts."""

    name: str  # shown to people, for example the folder's name
    folder: Path  # the run folder
    params: Mapping[str, Any]  # swept and non-default settings
    tags: Mapping[str, str]
    sweep_name: str | None = None  # with sweep_folder: the multirun this run belongs to
    sweep_folder: Path | None = None
    attempt: int = 0  # 0, then one more with every resume


class Tracker(Protocol):
    """A mirror of one run: `start`, then any number of `log` and `log_artifact`, then `finish`."""

    def start(self, info: RunInfo) -> None:
        """Begin the run, or continue it when `info.folder` was mirrored before."""

    def log(self, record: Mapping[str, float]) -> None:
        """Mirror a record of the metrics file, already written there. Returns at once."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Mirror a file under `folder`. It may be read later, so it must stay as it is until `finish`."""

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        """End the run with the status and the numbers of its result; waits a bounded time for the server."""


class NoTracker:
    """Mirrors nothing."""

    def start(self, info: RunInfo) -> None:
        pass

    def log(self, record: Mapping[str, float]) -> None:
        pass

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        pass


class GuardedTracker:
    """Passes everything on to a tracker until that raises; then warns once and switches it off."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def start(self, info: RunInfo) -> None:
        self._guard("start", info)

    def log(self, record: Mapping[str, float]) -> None:
        self._guard("log", record)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self._guard("log_artifact", path, folder)

    def finish(self, status: str, summary: Mapping[str, Any]) -> None:
        self._guard("finish", status, summary)

    def _guard(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:
            name = type(self._tracker).__name__
            _log.warning("%s.%s failed (%s: %s) and is switched off", name, method, type(error).__name__, error)
            self._tracker = NoTracker()


def build_tracker(config: TrackingConfig) -> Tracker:
    """The tracker of one run; build a new one for every run."""
    match config:
        case NoTrackingConfig():
            return NoTracker()
        case MlflowConfig():
            from lmtrain.tracking.mlflow import MlflowTracker

            return GuardedTracker(MlflowTracker(config))
        case _:
            raise ConfigError(f"no tracker is known for {type(config).__name__}")
