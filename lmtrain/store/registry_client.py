"""The way to an MLflow registry: a client that answers or refuses soon, and what it says in a line."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ModelStoreError, RunError
from lmtrain.redaction import redact
from lmtrain.store.naming import REGISTRY
from lmtrain.tracking.mlflow.connection import (
    DATABASES,
    SERVERS,
    SQLITE,
    explain_error,
    locked,
    prepare_mlflow,
    require_database,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient


def registry_uri(word: str) -> str:
    """The address that a word for a registry stands for. Raises ModelStoreError for one of an unknown kind."""
    uri = tracking_uri(TrackingConfig(mlflow=True, uri=None if word == REGISTRY else word))
    if "://" not in uri or not uri.startswith((*SERVERS, *DATABASES, SQLITE)):
        kinds = ", ".join((*SERVERS, *(f"{kind}://" for kind in DATABASES)))
        raise ModelStoreError(f"{redact(uri)} is no MLflow registry: its address begins with {kinds} or {SQLITE}")
    return uri


def connect(uri: str) -> MlflowClient:
    """A client of a registry that answers. Raises RunError if it is away, ModelStoreError if it refuses."""
    prepare_mlflow()
    from mlflow import MlflowClient

    with told(uri), locked(uri):
        require_database(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_registered_models(max_results=1)
    return client


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
