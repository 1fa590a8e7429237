"""MLflow made from run folders alone, or put right: after an outage, or in a store that never saw the runs.

Afterwards a run's metrics in MLflow are the records of its metrics file, no more and no less. MLflow takes nothing
back, so a run that holds what its file does not (a resumed run has redone steps) is made anew and the old one deleted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lmtrain.config.saved import load_yaml
from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ConfigError, LmtrainError, RunError
from lmtrain.redaction import redact
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import read_metrics
from lmtrain.tracking.mlflow.connection import (
    Store,
    connect,
    explain_error,
    is_refused,
    require_known_scheme,
    tracking_uri,
)
from lmtrain.tracking.mlflow.mirror import finish_parent, finish_run, open_parent, open_run
from lmtrain.tracking.mlflow.run import find_run, points_of
from lmtrain.tracking.run_info import DIED, RunEnding, RunInfo, SweepEnding, SweepInfo
from lmtrain.tracking.tracker import ModelWriter

CREATED, COMPLETED, REPLACED, UNCHANGED, RUNNING = "created", "completed", "replaced", "unchanged", "running"
"""What became of a run: it was not there; lacked something; held too much; was right; is not over."""


class Syncer:
    """Takes run folders to MLflow, each to the store and the experiment that its settings name."""

    def __init__(self, uri: str | None, experiment: str | None, write_model: ModelWriter | None) -> None:
        """`uri` and `experiment` instead of those of the runs; `write_model` as for `build_tracker`."""
        self._uri, self._experiment, self._write_model = uri, experiment, write_model
        self._stores: dict[tuple[str, str], Store] = {}

    def sync(self, folders: Iterable[Path]) -> Iterator[tuple[Path, str]]:
        """Each run folder and what became of it; then each sweep folder they lie in.

        Raises ConfigError for an address or credentials that MLflow refuses, RunError if it cannot be reached, and
        RunFolderError for a folder that cannot be read.
        """
        sweeps: dict[Path, list[Path]] = {}
        for folder in folders:
            info, config = RunInfo.read(folder), self._settings(folder)
            with _told_in_a_line(config, folder):
                outcome = sync_run(self._store(config, folder), config, info, self._write_model)
            if info.sweep is not None:
                sweeps.setdefault(info.sweep.folder, []).append(folder)
            yield folder, outcome
        for folder, runs in sweeps.items():
            config = self._settings(runs[0])
            with _told_in_a_line(config, folder):
                outcome = sync_sweep(self._store(config, folder), config, folder, runs, self._write_model)
            yield folder, outcome

    def _settings(self, folder: Path) -> TrackingConfig:
        """Those of tracking that a run was made with."""
        saved = load_yaml(RunDir(folder).config.read_text(encoding="utf-8")).get("tracking", {})
        names = {field.name for field in dataclasses.fields(TrackingConfig)}
        known = {key: value for key, value in saved.items() if key in names} | {"mlflow": True}
        return TrackingConfig(
            **known
            | ({} if self._uri is None else {"uri": self._uri})
            | ({} if self._experiment is None else {"experiment": self._experiment})
        )

    def _store(self, config: TrackingConfig, folder: Path) -> Store:
        uri = tracking_uri(config, folder)
        require_known_scheme(uri)
        key = uri, config.experiment
        if key not in self._stores:
            self._stores[key] = connect(config, folder)
        return self._stores[key]


@contextmanager
def _told_in_a_line(config: TrackingConfig, folder: Path) -> Iterator[None]:
    """Errors of MLflow as ours."""
    try:
        yield
    except LmtrainError:
        raise
    except Exception as error:
        kind = ConfigError if is_refused(error) else RunError
        raise kind(f"MLflow at {redact(tracking_uri(config, folder))}: {explain_error(error)}") from error


def sync_run(store: Store, config: TrackingConfig, info: RunInfo, write_model: ModelWriter | None) -> str:
    """Make the MLflow run of a run folder what the folder says; one that a process is at work on is left alone.

    Returns what became of it. Raises what MLflow raises.
    """
    folder = RunDir(info.folder)
    if folder.in_use():
        return RUNNING
    folder.lock()
    try:
        wanted = points_of(read_metrics(folder.metrics)) if folder.metrics.exists() else set()
        run, changes = find_run(store, info.folder, info.id), store.changes
        there = set() if run is None else run.points()
        outcome = CREATED if run is None else COMPLETED
        if run is not None and there - wanted:
            store.client.delete_run(run.id)
            run, there, outcome = None, set(), REPLACED
        run = open_run(store, config, info, run)
        run.add(wanted - there)
        finish_run(run, config, info, write_model)
        return outcome if store.changes > changes else UNCHANGED
    finally:
        folder.unlock()


def sync_sweep(
    store: Store, config: TrackingConfig, folder: Path, runs: list[Path], write_model: ModelWriter | None
) -> str:
    """End the MLflow run of a multirun as its folder says; that of one that died, when the last of its runs ended."""
    sweep, ending, changes = SweepInfo.of(folder), SweepEnding.read(folder), store.changes
    if ending is None:
        if any(RunDir(run).in_use() for run in runs):
            return RUNNING
        last = max(RunEnding.read(run).time for run in runs)
        ending = SweepEnding(status=DIED, time=last, metrics={}, files=[], best=None)
    finish_parent(open_parent(store, sweep, {}), config, folder, ending, write_model)
    return COMPLETED if store.changes > changes else UNCHANGED
