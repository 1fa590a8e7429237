"""The MLflow mirror: runs, and the parent run of a sweep.

Owns everything said to MLflow; no other module imports it. Decides neither what is logged nor when it is
sent. MLflow itself is imported at the first connection, not with this module: that takes two seconds.

A run folder keeps its MLflow run id in `mlflow_run.json`, so that a later attempt continues the same MLflow
run; a sweep folder likewise keeps that of its parent run. Whoever opens a run first sends what the metrics
file holds and MLflow lacks; from then on each metric only moves forward in steps. So no record is sent
twice, and what a killed attempt could not send is made good by the next. MLflow does not let a param
change: a resumed run keeps those of its first attempt.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from filelock import FileLock

from lmtrain.config.schema import MlflowConfig, TrackingConfig
from lmtrain.redaction import redact
from lmtrain.tracking.background import BackgroundTracker, one_line
from lmtrain.tracking.environment import git_state
from lmtrain.tracking.metrics_file import METRICS_FILE, read_metrics
from lmtrain.tracking.tracker import RunInfo

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

RUN_FILE = "mlflow_run.json"

_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARS = 1000, 100, 6000  # what MLflow takes in one call
_NOT_METRICS = frozenset({"step", "time", "attempt"})  # where a record stands, rather than what it measured
_STATUS = {
    "completed": "FINISHED",
    "early_stopped": "FINISHED",
    "pruned": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
    "diverged": "FAILED",
    "out_of_memory": "FAILED",
}
_ENVIRONMENT = {  # set unless the user did
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # BackgroundTracker repeats what fails; MLflow alone would hold up the end of a run for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_log = logging.getLogger(__name__)


class MlflowTracker(BackgroundTracker):
    """Mirrors one run to MLflow in the background."""

    def __init__(self, config: MlflowConfig) -> None:
        super().__init__(
            server=f"MLflow at {redact(tracking_uri(config))}",
            open_mirror=partial(open_run, config),
            is_transient=_is_transient,
            close_timeout=config.close_timeout,
        )


class MlflowRun:
    """One MLflow run, written to directly: every method waits for MLflow and raises what MLflow raises."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._id = run_id
        data = client.get_run(run_id).data
        self._params = set(data.params)
        self._last_steps = {  # per metric: the last step MLflow has
            key: max(metric.step for metric in client.get_metric_history(run_id, key)) for key in data.metrics
        }

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Set the tags, and the params that are new."""
        from mlflow.entities import Param, RunTag

        new = [Param(key, _format_param(value)) for key, value in params.items() if key not in self._params]
        for start in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self._id, params=new[start : start + _MAX_PARAMS])
        self._client.log_batch(self._id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log(self, records: Iterable[Mapping[str, float]]) -> None:
        """Send of each metric the steps MLflow does not have yet. Doing it again changes nothing."""
        from mlflow.entities import Metric

        metrics = []
        last_steps = dict(self._last_steps)
        for record in records:
            step, timestamp = int(record["step"]), round(record["time"] * 1000)
            for key in record.keys() - _NOT_METRICS:
                if step > last_steps.get(key, -1):
                    last_steps[key] = step
                    metrics.append(Metric(key, float(record[key]), timestamp, step))
        self._send(metrics)
        self._last_steps = last_steps

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Send a file. One that is refused is warned about and left out: the metrics matter more."""
        try:
            self._client.log_artifact(self._id, str(path), folder)
        except Exception as error:
            if _is_transient(error):
                raise
            _log.warning("MLflow did not take %s (%s)", path.name, one_line(error))

    def finish(self, status: str, summary: Mapping[str, Any], end_time: float) -> None:
        """End the run; the numbers of the summary become metrics `summary/...`, the status also a tag."""
        from mlflow.entities import Metric

        step, timestamp = max(self._last_steps.values(), default=0), round(end_time * 1000)
        self._send(
            [
                Metric(f"summary/{key}", float(value), timestamp, step)
                for key, value in summary.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            ]
        )
        self._client.set_tag(self._id, "status", status)
        self._client.set_terminated(self._id, _STATUS[status], timestamp)

    def _send(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MAX_METRICS])


def open_run(config: MlflowConfig, info: RunInfo, start_time: float) -> MlflowRun:
    """Create the MLflow run, or continue the run folder's own; send what it lacks of the past."""
    client, experiment_id = _connect(config, info.folder / RUN_FILE)
    tags = {**_origin_tags(), "attempt": str(info.attempt), **info.tags}
    if info.sweep_folder is not None:
        tags["mlflow.parentRunId"] = _open_parent(client, experiment_id, info.sweep_folder, info.sweep_name)
    name = config.run_name or info.name
    run = MlflowRun(client, _find_or_create(client, experiment_id, info.folder / RUN_FILE, name, start_time))
    run.describe(info.params, tags)
    if (metrics_file := info.folder / METRICS_FILE).exists():
        run.log(read_metrics(metrics_file))
    return run


def finish_parent(
    config: TrackingConfig,
    sweep_folder: Path,
    artifacts: Sequence[Path],
    metrics: Mapping[str, float],
    status: str,
) -> None:
    """End a sweep's parent run, if its runs were mirrored to MLflow. Warns instead of raising.

    Args:
        artifacts: files of the sweep folder to send along, for example the comparison.
        metrics: numbers about the whole sweep, shown as `summary/...`.
        status: how it ended, as that of a run.
    """
    run_file = sweep_folder / RUN_FILE
    if not isinstance(config, MlflowConfig) or not run_file.exists():
        return

    def work() -> None:
        try:
            client, _ = _connect(config, run_file)
            run = MlflowRun(client, json.loads(run_file.read_text())["run_id"])
            for path in artifacts:
                run.log_artifact(path, None if path.parent == sweep_folder else path.parent.name)
            run.finish(status, metrics, time.time())
        except Exception as error:
            _log.warning("MLflow at %s cannot be used (%s)", redact(tracking_uri(config)), one_line(error))

    thread = threading.Thread(target=work, name="mlflow", daemon=True)
    thread.start()
    thread.join(config.close_timeout)
    if thread.is_alive():
        _log.warning("MLflow did not take the sweep's parent run within %g s", config.close_timeout)


def tracking_uri(config: MlflowConfig, run_file: Path | None = None) -> str:
    """The config's address, else MLFLOW_TRACKING_URI, else where `run_file` says the run is, else a database here.

    Files are made absolute. So a run that is resumed from another folder goes on in its own store.
    """
    known = json.loads(run_file.read_text())["uri"] if run_file is not None and run_file.exists() else None
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or known or "sqlite:///mlflow.db"
    path = _sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def _sqlite_path(uri: str) -> Path | None:
    """The database file of an address, absolute; None when it is no file."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) and uri != prefix else None


def _connect(config: MlflowConfig, run_file: Path) -> tuple[MlflowClient, str]:
    """A client, and the id of the experiment, created when missing."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        # What they have to say reaches us as exceptions; their own lines would break the progress bar.
        logging.getLogger(name).setLevel(logging.CRITICAL)

    uri = tracking_uri(config, run_file)
    database = _sqlite_path(uri)
    if database is None:
        client = MlflowClient(uri)
        return client, _find_or_create_experiment(client, config.experiment, None)
    # Processes that start together must not create the tables together.
    with FileLock(f"{database}.lock"):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA schema_version")  # refuses at once what MLflow would try for minutes
        client = MlflowClient(uri)
        artifacts = database.parent / "mlruns" / quote(config.experiment, safe="")
        return client, _find_or_create_experiment(client, config.experiment, artifacts.as_uri())


def _find_or_create_experiment(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location))
        except MlflowException:  # another process was faster, or the second look says what is wrong
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _find_or_create(client: MlflowClient, experiment_id: str, run_file: Path, name: str, start_time: float) -> str:
    """The id of the run that `run_file` names, set running again; else of a new run, then named there."""
    from mlflow.exceptions import MlflowException

    if run_file.exists():
        run_id = str(json.loads(run_file.read_text())["run_id"])
        try:
            client.update_run(run_id, status="RUNNING")
            return run_id
        except MlflowException as error:
            if _is_transient(error):
                raise  # otherwise the run was deleted, or lives in another store
    run_id = str(client.create_run(experiment_id, round(start_time * 1000), run_name=name).info.run_id)
    record = {"uri": redact(client.tracking_uri), "experiment_id": experiment_id, "run_id": run_id}
    temporary = run_file.with_name(run_file.name + ".tmp")
    temporary.write_text(json.dumps(record) + "\n")
    temporary.replace(run_file)
    return run_id


def _open_parent(client: MlflowClient, experiment_id: str, folder: Path, name: str | None) -> str:
    """The parent run of a sweep; the first of its runs to come creates it."""
    with FileLock(folder / ".mlflow_run.lock"):
        parent = _find_or_create(client, experiment_id, folder / RUN_FILE, name or folder.name, time.time())
    MlflowRun(client, parent).describe({}, {**_origin_tags(), "sweep_folder": str(folder)})
    return parent


def _origin_tags() -> dict[str, str]:
    """Who ran what: the tags that MLflow's own runs carry."""
    tags = {"mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}
    with suppress(KeyError, OSError):  # a container may run under a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    if (state := git_state(Path.cwd())) is not None:
        tags |= {"mlflow.source.git.commit": state.commit, "mlflow.source.git.branch": state.branch}
        tags["git.dirty"] = str(state.dirty).lower()
    return tags


def _format_param(value: Any) -> str:
    """The value as one writes it on the command line, cut to what MLflow stores."""
    if value is None:
        return "null"
    return (str(value).lower() if isinstance(value, bool) else str(value))[:_MAX_PARAM_CHARS]


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: the server is away, or had a fault of its own."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and int(error.get_http_status_code()) >= 500  # type: ignore[no-untyped-call]
