"""Outages of a real MLflow server, and what `track sync` makes of the run folders afterwards.

What MLflow holds is read from its database with SQL, what it should hold from metrics.jsonl with json.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, CommandLine
from mlflow_server import MlflowServer, SlowProxy, Unauthorized, free_port

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

TABLES = ("metrics", "latest_metrics", "params", "tags", "runs", "logged_models", "logged_model_params", "inputs")
LARGEST = 1.7976931348623157e308  # what MLflow keeps for an infinity


@pytest.fixture(scope="module")
def words(corpus: Path) -> list[str]:
    tiny = [word for word in TINY if word != "tracking=none"]
    every = ("trainer.log_every=1", "trainer.eval_every=50", "trainer.checkpoint_every=50")
    return [f"data.path={corpus}", *tiny, *every, "tracking.system_metrics_every=1", "tracking.log_model=true"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    """One that is not started yet."""
    server = MlflowServer(tmp_path / "server")
    yield server
    server.kill()


def rows(database: Path, query: str, *values: object) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query, values).fetchall()


def dump(database: Path) -> dict[str, list[str]]:
    """All that the database says of runs."""
    return {table: sorted(map(repr, rows(database, f"SELECT * FROM {table}"))) for table in TABLES}


def run_of(database: Path, folder: Path) -> dict[str, Any]:
    """The one run of a folder that is not deleted."""
    own = json.loads((folder / ("run.json" if (folder / "run.json").exists() else "sweep.json")).read_text())
    found = rows(
        database,
        "SELECT r.run_uuid, r.status, r.start_time, r.end_time FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
        "WHERE t.key = 'lmtrain.id' AND t.value = ? AND r.lifecycle_stage = 'active'",
        own["id"],
    )
    assert len(found) == 1
    return dict(zip(("id", "status", "start", "end"), found[0], strict=True))


def tags_of(database: Path, run_id: str) -> dict[str, str]:
    return dict(rows(database, "SELECT key, value FROM tags WHERE run_uuid = ?", run_id))


def assert_exact(database: Path, folder: Path) -> None:
    """MLflow holds the records of the metrics file, each once, and none besides."""
    wanted: dict[tuple[str, int], tuple[Any, int]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for key in record.keys() - {"step", "time", "attempt"}:
            value = record[key]
            value = "nan" if value is None else max(-LARGEST, min(LARGEST, float(value)))
            # Records of training and of an evaluation at one step tell the same tokens.
            wanted.setdefault((key, record["step"]), (value, round(record["time"] * 1000)))
    query = "SELECT key, step, value, timestamp, is_nan FROM metrics WHERE run_uuid = ? AND key NOT LIKE 'summary/%'"
    held = rows(database, query, run_of(database, folder)["id"])
    points = Counter((key, step, "nan" if is_nan else value, time) for key, step, value, time, is_nan in held)
    assert points == Counter((key, step, value, time) for (key, step), (value, time) in wanted.items())


def assert_synced(lmtrain: CommandLine, database: Path, *folders: Path, words: tuple[str, ...] = ()) -> str:
    """After `track sync` the database is exact, and doing it again changes nothing. Returns what the first one said."""
    said = lmtrain("track", "sync", *map(str, folders), *words).stdout
    for folder in folders:
        for run in [folder] if (folder / "metrics.jsonl").exists() else sorted(folder.glob("[0-9]*/")):
            assert_exact(database, run)
    before = dump(database)
    again = lmtrain("track", "sync", *map(str, folders), *words).stdout
    assert dump(database) == before
    assert {line.split()[0] for line in again.splitlines()} == {"unchanged"}
    return said


def warnings_of(folder: Path) -> list[str]:
    return [line for line in (folder / "lmtrain.log").read_text().splitlines() if " WARNING " in line]


def wait_for_metrics(database: Path, run: subprocess.Popen[str]) -> None:
    """Until the mirror has begun."""
    deadline = time.monotonic() + 120
    while not rows(database, "SELECT 1 FROM metrics LIMIT 1"):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_step(folder: Path, step: int, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ((file := folder / "metrics.jsonl").exists() and file.read_bytes().count(b"\n") > step):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(run: subprocess.Popen[str], status: int = 0) -> str:
    out, err = run.communicate(timeout=300)
    assert run.returncode == status, f"{out}\n{err}"
    return out + err


# ----------------------------------------------------------------------------------------------------- outages


def down_at_start(server: MlflowServer, folder: Path, run: subprocess.Popen[str]) -> None:
    wait_for_step(folder, 100, run)
    server.begin()  # and is there at some time later


def killed_in_the_middle(server: MlflowServer, folder: Path, run: subprocess.Popen[str]) -> None:
    wait_for_metrics(server.database, run)
    server.kill()
    wait_for_step(folder, (folder / "metrics.jsonl").read_bytes().count(b"\n") + 300, run)
    server.begin()


def gone_for_good(server: MlflowServer, folder: Path, run: subprocess.Popen[str]) -> None:
    wait_for_metrics(server.database, run)
    server.kill()


@pytest.mark.parametrize("outage", [down_at_start, killed_in_the_middle, gone_for_good])
def test_an_outage_costs_a_warning_and_sync_makes_it_good(
    lmtrain: CommandLine,
    words: list[str],
    server: MlflowServer,
    outage: Callable[[MlflowServer, Path, subprocess.Popen[str]], None],
) -> None:
    if outage is not down_at_start:
        server.start()
    folder = lmtrain.folder / "run"
    steps = ("trainer.max_steps=3000", "hydra.run.dir=run")
    run = lmtrain.start(*words, f"tracking.uri={server.uri}", *steps, "tracking=mlflow")
    outage(server, folder, run)
    finish(run)
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert len(warnings_of(folder)) <= 1
    if outage is gone_for_good:
        assert "lmtrain track sync run" in warnings_of(folder)[0]
        server.begin()
    server.wait()
    assert_synced(lmtrain, server.database, folder)
    assert run_of(server.database, folder)["status"] == "FINISHED"


def test_a_server_that_answers_after_ten_seconds_does_not_hold_up_a_run(
    lmtrain: CommandLine, words: list[str], server: MlflowServer
) -> None:
    server.start()
    folder = lmtrain.folder / "run"
    with SlowProxy(server.port, delay=10) as proxy:
        to = (f"tracking.uri={proxy.uri}", "tracking=mlflow", "hydra.run.dir=run", "trainer.max_steps=3000")
        run = lmtrain.start(*words, *to)
        finish(run)
        assert proxy.requests
        assert len(warnings_of(folder)) <= 1
        result = json.loads((folder / "result.json").read_text())
        assert result["status"] == "completed"
        proxy.delay = 0
        time.sleep(10)  # requests under way still arrive
        assert_synced(lmtrain, server.database, folder)


# ------------------------------------------------------------------------------------------- folders alone


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> CommandLine:
    """A grid and a study, mirrored to a database of their own; both folders are moved, the database is gone."""
    there = CommandLine(tmp_path_factory.mktemp("there"))
    short = [*words, "tracking=mlflow", "trainer.max_steps=60"]
    there("--multirun", *short, "lr=1e-3,1e-2", "sweep.name=grid")
    by_tokens = [
        word for word in short if not word.startswith(("batch_size", "trainer.max_steps", "trainer.eval_every"))
    ]
    budget = ("trainer.max_tokens=3200", "trainer.eval_every_tokens=640")
    study = ("sweep=lr_dropout_batch", "hydra.sweeper.n_trials=3", "sweep.name=study")
    there("--multirun", *by_tokens, *budget, *study)
    here = CommandLine(tmp_path_factory.mktemp("here"))
    shutil.copytree(there.folder / "multirun", here.folder / "copied")
    shutil.rmtree(there.folder)
    return here


def test_a_store_is_made_from_folders_on_another_machine(sweeps: CommandLine) -> None:
    database, grid, study = sweeps.folder / "new.db", sweeps.folder / "copied/grid", sweeps.folder / "copied/study"
    said = assert_synced(sweeps, database, grid, study, words=("--uri", f"sqlite:///{database}"))
    assert "created" in said
    for sweep, number in ((grid, 2), (study, 3)):
        parent = run_of(database, sweep)
        assert parent["status"] == "FINISHED"
        runs = sorted(folder.parent for folder in sweep.glob("*/run.json"))
        assert len(runs) == number
        for run in runs:
            child = run_of(database, run)
            assert child["status"] == "FINISHED"
            assert tags_of(database, child["id"])["mlflow.parentRunId"] == parent["id"]
            assert parent["start"] <= child["start"] <= child["end"] <= parent["end"]
    assert rows(database, "SELECT count(*) FROM runs") == [(7,)]


def test_two_syncs_at_once_make_each_run_once(sweeps: CommandLine) -> None:
    database = sweeps.folder / "both.db"
    to = ("track", "sync", "copied", "--uri", f"sqlite:///{database}")
    both = [sweeps.start(*to), sweeps.start(*to)]
    for one in both:
        finish(one)
    assert_synced(sweeps, database, *sorted((sweeps.folder / "copied").iterdir()), words=to[3:])
    assert rows(database, "SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'") == [(7,)]


# ------------------------------------------------------------------------------------------ runs that ended badly


def test_a_run_killed_and_resumed_is_exact_after_sync(lmtrain: CommandLine, words: list[str]) -> None:
    """What it redid had been sent once before."""
    folder, database = lmtrain.folder / "run", lmtrain.folder / "mlflow.db"
    run = lmtrain.start(*words, "tracking=mlflow", "trainer.max_steps=4000", "hydra.run.dir=run")
    deadline = time.monotonic() + 120
    sent = "SELECT max(step) FROM metrics"
    while not (folder / "mlflow_run.json").exists() or (rows(database, sent)[0][0] or 0) < 200:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    lmtrain("resume=run")
    assert_synced(lmtrain, database, folder)
    assert run_of(database, folder)["status"] == "FINISHED"


@pytest.mark.parametrize("closed_by", ["the next run", "sync"])
def test_a_run_killed_is_closed(lmtrain: CommandLine, words: list[str], closed_by: str) -> None:
    folder, database = lmtrain.folder / "run", lmtrain.folder / "mlflow.db"
    run = lmtrain.start(*words, "tracking=mlflow", "trainer.max_steps=100000", "hydra.run.dir=run")
    wait_for_step(folder, 50, run)
    while not (folder / "mlflow_run.json").exists() or not rows(database, "SELECT * FROM metrics"):
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert run_of(database, folder)["status"] == "RUNNING"
    if closed_by == "sync":
        assert_synced(lmtrain, database, folder)
    else:
        lmtrain(*words, "tracking=mlflow", "trainer.max_steps=5", "hydra.run.dir=next")
    ended = run_of(database, folder)
    assert ended["status"] == "KILLED"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(ended["end"] / 1000 - last["time"]) < 60, "about when it was last heard of"


def test_a_run_that_fails_is_closed_as_failed(lmtrain: CommandLine, words: list[str]) -> None:
    bad = ("lr=1e9", "optimizer=sgd", "trainer.on_nonfinite=stop", "trainer.grad_clip=null")
    run = (*words, *bad, "tracking=mlflow", "trainer.max_steps=500", "hydra.run.dir=run")
    lmtrain(*run, status=1)
    folder, database = lmtrain.folder / "run", lmtrain.folder / "mlflow.db"
    assert run_of(database, folder)["status"] == "FAILED"
    assert_synced(lmtrain, database, folder)
    assert run_of(database, folder)["status"] == "FAILED"


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def unauthorized() -> Iterator[str]:
    """A server that lets nobody in."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unauthorized)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_missing_credentials_are_named(lmtrain: CommandLine, words: list[str], unauthorized: str) -> None:
    to = ("tracking=mlflow", f"tracking.uri={unauthorized}", "hydra.run.dir=run", "trainer.max_steps=200")
    lmtrain(*words, *to)
    (warning,) = warnings_of(lmtrain.folder / "run")
    said = lmtrain("track", "sync", "run", status=2).stderr
    assert said.count("\n") == 1
    for text in (warning, said):
        assert "MLFLOW_TRACKING_USERNAME" in text
        assert unauthorized in text


def test_an_unknown_scheme_is_refused(lmtrain: CommandLine, words: list[str]) -> None:
    said = lmtrain(*words, "tracking=mlflow", "tracking.uri=gopher://host", "hydra.run.dir=run", status=2)
    assert "gopher://host is no address of MLflow" in said.stderr
    assert not (lmtrain.folder / "run").exists()
    lmtrain(*words, "tracking=none", "trainer.max_steps=5", "hydra.run.dir=run")
    before = sorted(lmtrain.folder.rglob("*"))
    said = lmtrain("track", "sync", "run", "--uri", "gopher://host", status=2)
    assert said.stderr.count("\n") == 1
    assert "gopher://host is no address of MLflow" in said.stderr
    assert sorted(lmtrain.folder.rglob("*")) == before


def test_a_torn_last_line_is_left_out_with_a_notice(lmtrain: CommandLine, words: list[str]) -> None:
    lmtrain(*words, "tracking=none", "trainer.max_steps=20", "hydra.run.dir=run")
    folder = lmtrain.folder / "run"
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole + b'{"step": 21, "train/lo')
    said = lmtrain("track", "sync", "run")
    assert (said.stdout + said.stderr).count("ends in the middle of a line") == 1
    (folder / "metrics.jsonl").write_bytes(whole)
    assert_exact(lmtrain.folder / "mlflow.db", folder)


def test_a_server_that_is_away_fails_sync_in_a_line(lmtrain: CommandLine, words: list[str]) -> None:
    lmtrain(*words, "tracking=none", "trainer.max_steps=5", "hydra.run.dir=run")
    said = lmtrain("track", "sync", "run", "--uri", f"http://127.0.0.1:{free_port()}", status=1)
    assert said.stderr.count("\n") == 1
    assert "Connection refused" in said.stderr
