"""Runs and multiruns mirrored to MLflow as they go.

Whoever opens a run first sends what the metrics file holds and MLflow lacks; from then on each metric only moves
forward in steps. So no record is sent twice, and what a killed attempt could not send is made good by the next. Runs of
this machine that died without a word are closed by the next one that comes.
"""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from lmtrain.config.schema import TrackingConfig
from lmtrain.redaction import redact
from lmtrain.run_dir import RunDir
from lmtrain.tracking.background import SHORTEST_SILENCE, SILENCE, Request, wait_for
from lmtrain.tracking.metrics_file import read_metrics
from lmtrain.tracking.mlflow.connection import (
    Store,
    connect,
    explain_error,
    known_run,
    tracking_uri,
)
from lmtrain.tracking.mlflow.run import (
    FOLDER_TAG,
    HOST_TAG,
    PARENT_TAG,
    MlflowRun,
    create_run,
    find_run,
    note_run,
    tags_of,
)
from lmtrain.tracking.run_info import RunEnding, RunInfo, SweepEnding, SweepInfo
from lmtrain.tracking.tracker import ModelWriter

log = logging.getLogger(__name__)


class MlflowMirror:
    """A run that goes on, in MLflow."""

    def __init__(
        self, config: TrackingConfig, write_model: ModelWriter | None, info: RunInfo, request: Request
    ) -> None:
        self._config, self._info, self._write_model = config, info, write_model
        store = connect(config, info.folder, request)
        self._run = open_run(store, config, info, find_run(store, info.folder, info.id))
        store.client.update_run(self._run.id, status="RUNNING")
        if (metrics := RunDir(info.folder).metrics).exists():
            self.log(read_metrics(metrics))
        _close_dead_runs(store, but=self._run.id)

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        self._run.log(records)

    def finish(self) -> None:
        finish_run(self._run, self._config, self._info, self._write_model)


def open_run(store: Store, config: TrackingConfig, info: RunInfo, found: MlflowRun | None) -> MlflowRun:
    """The MLflow run of a run folder, made if none was found, and described."""
    name = config.run_name or info.name
    run = found or create_run(store, info.folder, info.id, name, info.started)
    note_run(store, info.folder, run.id)
    tags = {"attempt": str(info.attempt), FOLDER_TAG: str(info.folder.absolute()), **tags_of(info.origin), **info.tags}
    if info.sweep is not None:
        tags |= {"study": info.sweep.name, PARENT_TAG: open_parent(store, info.sweep, info.origin).id}
    run.describe(info.params, tags)
    run.log_dataset(info.dataset)
    return run


def finish_run(run: MlflowRun, config: TrackingConfig, info: RunInfo, write_model: ModelWriter | None) -> None:
    """End an MLflow run as its folder says the run ended, with the files that tell of it and its model."""
    folder, ending = RunDir(info.folder), RunEnding.read(info.folder)
    files: dict[Path, str | None] = dict.fromkeys(folder.artifacts())
    run.log_files(files | dict.fromkeys(sorted(folder.plots.glob("*.png")), "plots"))
    if config.log_model and info.sweep is None and ending.status in ("completed", "early_stopped"):
        run.log_model(info.folder, write_model)
    run.finish(ending.status, ending.summary, ending.time)


def _close_dead_runs(store: Store, but: str) -> None:
    """End the runs of this machine that MLflow takes for running and no process is at work on."""
    here = f"attributes.status = 'RUNNING' AND tags.`{HOST_TAG}` = '{platform.node()}'"
    for found in store.client.search_runs([store.experiment_id], here):
        folder = RunDir(Path(found.data.tags.get(FOLDER_TAG, "")))
        if found.info.run_id != but and folder.is_run() and not folder.in_use():
            ending = RunEnding.read(folder.path)
            MlflowRun(store, found).finish(ending.status, ending.summary, ending.time)


def open_parent(store: Store, sweep: SweepInfo, origin: Mapping[str, str]) -> MlflowRun:
    """The MLflow run that stands for a multirun; the first of its runs to come creates it."""
    with FileLock(sweep.folder / ".mlflow_run.lock"):
        parent = find_run(store, sweep.folder, sweep.id)
        if parent is None:
            parent = create_run(store, sweep.folder, sweep.id, sweep.name, sweep.started)
        note_run(store, sweep.folder, parent.id)
    parent.describe({}, {"study": sweep.name, FOLDER_TAG: str(sweep.folder.absolute()), **tags_of(origin)})
    return parent


def finish_parent(
    parent: MlflowRun, config: TrackingConfig, folder: Path, ending: SweepEnding, write_model: ModelWriter | None
) -> None:
    """End the MLflow run of a multirun, with its files and the model of its best run."""
    parent.log_files({path: None if path.parent == folder else path.parent.name for path in ending.files})
    if config.log_model and ending.best is not None and ending.status == "completed":
        parent.log_model(ending.best, write_model)
    parent.finish(ending.status, ending.metrics, ending.time)


def finish_sweep(
    config: TrackingConfig, folder: Path, ending: SweepEnding, write_model: ModelWriter | None = None
) -> None:
    """Note in a sweep folder how the multirun ended, and in MLflow if its runs were mirrored there.

    Waits a bounded time, and warns instead of raising.
    """
    if not folder.is_dir():
        return
    sweep = SweepInfo.of(folder)
    ending.write(folder)
    remedy = f"later, lmtrain track sync {RunDir(folder)} makes MLflow complete"
    if not config.mlflow or known_run(folder) is None:
        return

    server, request = f"MLflow at {redact(tracking_uri(config, folder))}", Request()

    def work() -> None:
        try:
            store = connect(config, folder, request)
            finish_parent(open_parent(store, sweep, {}), config, folder, ending, write_model)
        except Exception as error:
            log.warning("%s cannot be used (%s); %s", server, explain_error(error), remedy)

    thread = threading.Thread(target=work, name="mlflow", daemon=True)
    thread.start()
    patience = max(SHORTEST_SILENCE, SILENCE * (ending.time - sweep.started))
    if problem := wait_for(thread, request, patience=patience, timeout=config.close_timeout):
        log.warning("%s %s; %s", server, problem, remedy)
