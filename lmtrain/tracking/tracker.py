"""The face every tracker shows to a run, and the choice among them.

Owns the protocol and the guard that keeps a broken mirror away from training. A tracker only mirrors: the files of
the run folder decide what happened, and nothing here may stop or slow a run.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ConfigError
from lmtrain.tracking.run_info import RunInfo

log = logging.getLogger(__name__)

ModelWriter = Callable[[Path, Path], object]
"""Writes the model of a run folder as an MLflow model into a new folder. Raises LmtrainError if it has none."""


class Tracker(Protocol):
    """A mirror of one run: `start`, then any number of `log`, then `finish`. Every method but that returns at once."""

    def start(self, info: RunInfo) -> None:
        """Begin the run, or continue it when `info.id` was mirrored before."""

    def log(self, record: Mapping[str, float]) -> None:
        """Mirror a record of the metrics file, already written there."""

    def finish(self) -> None:
        """End the run as its folder says it ended; waits a bounded time for what is still to be mirrored."""


class GuardedTracker:
    """Passes everything on to a tracker until that raises; then warns once and lets it be."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker: Tracker | None = tracker

    def start(self, info: RunInfo) -> None:
        self._guard("start", info)

    def log(self, record: Mapping[str, float]) -> None:
        self._guard("log", record)

    def finish(self) -> None:
        self._guard("finish")

    def _guard(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:
            name = type(self._tracker).__name__
            log.warning("%s.%s failed (%s: %s) and is switched off", name, method, type(error).__name__, error)
            self._tracker = None


class Trackers:
    """Several trackers as one, or none at all; a broken one does not disturb the others."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = [GuardedTracker(tracker) for tracker in trackers]

    def start(self, info: RunInfo) -> None:
        for tracker in self._trackers:
            tracker.start(info)

    def log(self, record: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(record)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def build_tracker(config: TrackingConfig, write_model: ModelWriter | None = None) -> Tracker:
    """The trackers of one run as one; build a new one for every run.

    Raises ConfigError for an address that no tracker can use, or one whose library is not installed.
    """
    trackers: list[Tracker] = []
    if config.mlflow:
        from lmtrain.tracking.mlflow.tracker import MlflowTracker

        trackers.append(MlflowTracker(config, write_model))
    if config.tensorboard:
        _require_library("tensorboard")
        from lmtrain.tracking.tensorboard import TensorboardTracker

        trackers.append(TensorboardTracker(config))
    if config.wandb:
        _require_library("wandb")
        from lmtrain.tracking.wandb import WandbTracker

        trackers.append(WandbTracker(config))
    return Trackers(trackers)


def _require_library(name: str) -> None:
    """Raise ConfigError unless the library of a tracker, which our extra of the same name brings, is installed."""
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"tracking.{name} needs the library {name}: pip install 'lmtrain[{name}]'")
