"""The way to an MLflow registry: a client that answers or refuses soon, and what it says in a line."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ModelStoreError, RunError
from lmtrain.redaction import redact
from lmtrain.store.naming import REGISTRY
from lmtrain.tracking.mlflow.connection import explain_error, prepare_mlflow, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVERS, DATABASES, SQLITE = ("http://", "https://"), ("postgresql", "mysql", "mssql"), "sqlite:///"
CONNECT_SECONDS = 8  # that a database server may take to answer


def registry_uri(word: str) -> str:
    """The address that a word for a registry stands for. Raises ModelStoreError for one of an unknown kind."""
    uri = tracking_uri(TrackingConfig(mlflow=True, uri=None if word == REGISTRY else word))
    if "://" not in uri or not uri.startswith((*SERVERS, *DATABASES, SQLITE)):
        kinds = ", ".join((*SERVERS, *(f"{kind}://" for kind in DATABASES)))
        raise ModelStoreError(f"{redact(uri)} is no MLflow registry: its address begins with {kinds} or {SQLITE}")
    return uri


def database_file(uri: str) -> Path | None:
    """The file of an SQLite registry."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def connect(uri: str) -> MlflowClient:
    """A client of a registry that answers. Raises RunError if it is away, ModelStoreError if it refuses."""
    prepare_mlflow()
    from mlflow import MlflowClient

    with told(uri), locked(uri):
        _require_database(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_registered_models(max_results=1)
    return client


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """While entered, no other process makes tables or numbers versions in the database, if it is a file."""
    database = database_file(uri)
    if database is None:
        yield
        return
    with FileLock(f"{database}.lock"):
        yield


@contextmanager
def told(uri: str) -> Iterator[None]:
    """Raise what a registry or its database raises as an error of ours: ModelStoreError for 4xx, else RunError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    where = f"the registry {redact(uri)}"
    try:
        yield
    except MlflowException as error:
        refused = 400 <= int(error.get_http_status_code()) < 500  # type: ignore[no-untyped-call]
        kind, what = (ModelStoreError, "refuses") if refused else (RunError, "cannot be used")
        raise kind(f"{where} {what}: {redact(explain_error(error))}") from error
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise RunError(f"{where} cannot be used: {redact(explain_error(error))}") from error
    except ImportError as error:  # a driver
        raise ModelStoreError(f"{where} needs the Python package {error.name}: install it") from error


def _require_database(uri: str) -> None:
    """Raise at once what MLflow would try again for minutes."""
    database = database_file(uri)
    if database is not None:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA schema_version")
    elif not uri.startswith(SERVERS):
        from sqlalchemy import create_engine

        limited = not uri.startswith("mssql") and "connect_timeout" not in uri
        engine = create_engine(uri, connect_args={"connect_timeout": CONNECT_SECONDS} if limited else {})
        with engine.connect():
            pass
