"""Where a study is kept: a journal file on one machine, a database for several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from lmtrain.errors import ConfigError
from lmtrain.redaction import redact
from lmtrain.tracking.background import one_line

NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smbfs", "smb3", "lustre", "gpfs", "beegfs", "glusterfs", "ceph"}
)

DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "pymysql": "pymysql", "MySQLdb": "mysqlclient"}
"""Module of a database driver → package to install."""

SERVERS = ("postgresql", "mysql", "mariadb")
"""How the addresses of databases begin whose drivers take a limit in seconds on waiting for the server."""

CONNECT_SECONDS = 8

_CREATION_ATTEMPTS = 5

optuna.logging.set_verbosity(optuna.logging.ERROR)  # a study has a display of its own


def is_url(where: str) -> bool:
    """Whether a storage is a database, not a file."""
    return "://" in where


def open_storage(where: str, *, create: bool = True) -> BaseStorage:
    """The storage at a database URL or a journal file's path. Raises ConfigError if it cannot be used.

    `create=False`: it must be there already.
    """
    if not create and (file := _file_of(where)) is not None and not file.is_file():
        raise ConfigError(f"the study's storage {file} is not there")  # to open it would create it
    if not is_url(where):
        if not where.endswith(".journal"):
            raise ConfigError(
                f"hydra.sweeper.storage={where} is neither a database (postgresql://...) nor a file named *.journal"
            )
        return JournalStorage(JournalFileBackend(where))
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(_CREATION_ATTEMPTS):
        try:
            return optuna.storages.get_storage(
                RDBStorage(where, engine_kwargs=_engine_of(where), skip_table_creation=not create)
            )
        except (SQLAlchemyError, ImportError) as error:
            # Two that create the tables at once: the slower one finds them there the next time.
            if attempt == _CREATION_ATTEMPTS - 1 or not _may_be_there_now(error):
                instead = (
                    "\nhydra.sweeper.storage=null keeps the study in a file of the sweep's folder" if create else ""
                )
                raise ConfigError(
                    f"the study's storage {redact(where)} cannot be used: {_why(error)}{instead}"
                ) from error
    raise AssertionError("unreachable")


def _engine_of(where: str) -> dict[str, Any]:
    """How SQLAlchemy connects: a connection that the server closed overnight is opened again, one that no server
    answers is given up.
    """
    limited = where.startswith(SERVERS) and "connect_timeout" not in where
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS} if limited else {}}


def _why(error: BaseException) -> str:
    """One line without the password, with the package to install if that is what is missing."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name in DRIVERS:
            return f"its driver is not installed, pip install {DRIVERS[cause.name]}"
        cause = cause.__cause__ or cause.__context__
    return redact(one_line(error))


def _file_of(where: str) -> Path | None:
    """The file of a storage; None if it is on a server."""
    if not is_url(where):
        return Path(where)
    path = where.partition("///")[2] if where.startswith("sqlite") else ""
    return Path(path.partition("?")[0]) if path else None


def _may_be_there_now(error: Exception) -> bool:
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    text = str(error).lower()
    return isinstance(error, IntegrityError | OperationalError | ProgrammingError) and (
        "already exists" in text or "unique" in text or "duplicate" in text
    )


def doubts(where: str, *, workers: int) -> str | None:
    """Why a storage may not serve so many workers, with what to use instead; None if it will."""
    better = "use a database server: hydra.sweeper.storage=postgresql://USER:PASSWORD@HOST/DATABASE"
    if where.startswith("sqlite:") and workers > 1:
        return f"SQLite is not made for {workers} workers at once: leave hydra.sweeper.storage out, or {better}"
    if not is_url(where) and (kind := filesystem_of(Path(where))) in NETWORK_FILESYSTEMS:
        return f"{where} lies on a network filesystem ({kind}), where locks may not hold: {better}"
    return None


def filesystem_of(path: Path) -> str:
    """The type of the filesystem a path lies on, as the system calls it."""
    resolved = path.absolute()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if resolved.is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""


def journal_path(folder: Path) -> str:
    """The journal file of a sweep folder."""
    return os.fspath(folder / "study.journal")
