"""Which MLflow store is meant, and a connection to it that fails soon.

Owns addresses, environment, the experiment and what an error of MLflow means. MLflow itself is imported with the first
connection, not with this module: that takes two seconds.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from filelock import FileLock

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ConfigError
from lmtrain.redaction import redact
from lmtrain.tracking.background import Request, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_FILE = "mlflow_run.json"
"""In a run or sweep folder: where its MLflow run is."""

SERVERS, DATABASES, SQLITE = ("http://", "https://"), ("postgresql", "mysql", "mssql"), "sqlite:///"
CONNECT_SECONDS = 8  # that a database server may take to answer

SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "file", "databricks", "databricks-uc", "uc")
"""Addresses of MLflow, besides those that plugins add and plain folders."""

ENVIRONMENT = {  # set unless the user did
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    # What is away is asked again by BackgroundTracker; MLflow alone would hold up the end of a run for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # at once, and so the end of a run soon knows
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Store:
    """A connection to the experiment that runs are mirrored to."""

    def __init__(self, client: MlflowClient, experiment_id: str, request: Request | None = None) -> None:
        """`request` is told when the store is waited for."""
        self._watched = _WatchedClient(client, request)
        self.client = cast("MlflowClient", self._watched)
        self.experiment_id = experiment_id

    @property
    def uri(self) -> str:
        return str(self.client.tracking_uri)

    @property
    def changes(self) -> int:
        """Requests so far that were made to change something."""
        return self._watched.changes


class _WatchedClient:
    """A client that says while it waits, and counts what changes the store."""

    def __init__(self, client: MlflowClient, request: Request | None) -> None:
        self._client = client
        self._request = request or Request()
        self.changes = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            self.changes += not name.startswith(("get_", "search_", "list_"))
            with self._request.waiting():
                return value(*arguments, **named)

        return call


def connect(config: TrackingConfig, folder: Path, request: Request | None = None) -> Store:
    """Connect to the store of a run or sweep folder; its experiment is created when missing. Raises what MLflow raises.

    `request` is told when a server is waited for; a database on this machine is not one.
    """
    uri = tracking_uri(config, folder)
    prepare_mlflow()
    from mlflow import MlflowClient

    database = database_file(uri)
    request = Request() if database is not None or request is None else request
    artifacts = None if database is None else database.parent / "mlruns" / quote(config.experiment, safe="")
    with locked(uri), request.waiting():
        require_database(uri)
        client = MlflowClient(uri)
        location = None if artifacts is None else artifacts.as_uri()
        return Store(client, _find_or_create_experiment(client, config.experiment, location), request)


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """While entered, no other process makes tables or numbers versions in the database, if it is a file."""
    database = database_file(uri)
    if database is None:
        yield
        return
    with FileLock(f"{database}.lock"):
        yield


def require_database(uri: str) -> None:
    """Raise at once, of an address that is a database's, what MLflow would try again for minutes."""
    database = database_file(uri)
    if database is not None:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA schema_version")
    elif uri.startswith(DATABASES):
        from sqlalchemy import create_engine

        limited = not uri.startswith("mssql") and "connect_timeout" not in uri
        engine = create_engine(uri, connect_args={"connect_timeout": CONNECT_SECONDS} if limited else {})
        with engine.connect():
            pass


def prepare_mlflow() -> None:
    """What must be so before MLflow is imported: no telemetry, short timeouts, no lines of its own."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        # What they have to say reaches us as exceptions; their own lines would break the progress bar.
        logging.getLogger(name).setLevel(logging.CRITICAL)


def tracking_uri(config: TrackingConfig, folder: Path | None = None) -> str:
    """The config's address, else MLFLOW_TRACKING_URI, else where `folder` says its run is, else a database here.

    Files are made absolute. So a run that is resumed from another folder goes on in its own store.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or _known_uri(folder) or "sqlite:///mlflow.db"
    path = database_file(uri)
    return uri if path is None else f"sqlite:///{path}"


def _known_uri(folder: Path | None) -> str | None:
    """What `mlflow_run.json` says; None of a database that is not on this machine."""
    known = None if folder is None else known_run(folder)
    uri = None if known is None else str(known["uri"])
    path = None if uri is None else database_file(uri)
    return None if path is not None and not path.is_file() else uri


def known_run(folder: Path) -> dict[str, str] | None:
    """`uri`, `experiment_id` and `run_id` of the MLflow run that a folder was mirrored to last."""
    try:
        known: dict[str, str] = json.loads((folder / RUN_FILE).read_text())
    except (FileNotFoundError, ValueError):  # a torn one is made again
        return None
    return known


def require_known_scheme(uri: str) -> None:
    """Raise ConfigError for an address that no MLflow can open."""
    scheme, separator, _ = uri.partition("://")
    kind = scheme.partition("+")[0]  # postgresql+psycopg
    known = [*SCHEMES, *(point.name for point in metadata.entry_points(group="mlflow.tracking_store"))]
    if separator and kind not in known:
        raise ConfigError(f"{redact(uri)} is no address of MLflow: it must begin with one of {', '.join(known)}")


def database_file(uri: str) -> Path | None:
    """The SQLite file of an address, absolute; None when it is no file."""
    return Path(uri.removeprefix(SQLITE)).resolve() if uri.startswith(SQLITE) and uri != SQLITE else None


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


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server is away, or had a fault of its own."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if not isinstance(error, MlflowException):
        return isinstance(error, OperationalError)  # of a database server
    status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
    return status >= 500 or status == 429  # too many requests


def is_refused(error: BaseException) -> bool:
    """Whether the server wants to know who asks, or does not let them."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)  # type: ignore[no-untyped-call]


def explain_error(error: BaseException) -> str:
    """An error of MLflow in a line, with what to do if it wants to know who asks."""
    if is_refused(error):
        return (
            f"it does not let you in ({one_line(error)}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN"
        )
    return one_line(error)
