"""A PostgreSQL server of the tests' own."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SOMEBODY = "nobody"
"""PostgreSQL refuses to run as root; as root the tests start it as this user."""


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of an empty database on a server that lives as long as the tests; skips where there is none."""
    pytest.importorskip("psycopg")
    places = [os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    found = shutil.which("initdb", path=os.pathsep.join(places))
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    programs = Path(found).resolve().parent
    as_user = {"user": SOMEBODY} if getpass.getuser() == "root" else {}
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        if as_user:
            shutil.chown(temporary, SOMEBODY)
        data, log = f"{temporary}/data", f"{temporary}/log"
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": temporary, **as_user}
        subprocess.run([programs / "initdb", "-D", data, "-U", "tester", "-A", "trust", "--no-sync"], **quiet)  # type: ignore[call-overload]
        options = f"-p {port} -k {temporary} -c listen_addresses=127.0.0.1 -c fsync=off"
        subprocess.run([programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start"], **quiet)  # type: ignore[call-overload]
        try:
            yield f"postgresql://tester:secret@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **quiet)  # type: ignore[call-overload]
