"""The MLflow mirror against real stores: a database, a server on loopback, places where there is none."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mirrored_runs
import pytest
from mirrored_runs import end, record, run_info
from mlflow_server import MlflowServer, free_port

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ConfigError
from lmtrain.redaction import redact
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import MetricsFile, truncate_after
from lmtrain.tracking.mlflow.connection import tracking_uri
from lmtrain.tracking.mlflow.mirror import finish_sweep
from lmtrain.tracking.run_info import DatasetInfo, SweepEnding, SweepInfo
from lmtrain.tracking.tracker import build_tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: creating the tables takes two seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def client_of(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def to_mlflow(uri: str | None, **fields: Any) -> TrackingConfig:
    return TrackingConfig(mlflow=True, uri=uri, **fields)


def mirrored(uri: str, folder: Path) -> Run:
    """The MLflow run of a run folder."""
    return client_of(uri).get_run(json.loads((folder / "mlflow_run.json").read_text())["run_id"])


def history(uri: str, folder: Path, metric: str) -> list[tuple[int, float, int]]:
    run_id = mirrored(uri, folder).info.run_id
    points = client_of(uri).get_metric_history(run_id, metric)
    return sorted((point.step, point.value, point.timestamp) for point in points)


def attempt(uri: str, folder: Path, steps: range, **fields: Any) -> None:
    """A run over some steps."""
    mirrored_runs.attempt(to_mlflow(uri), folder, map(record, steps), **fields)


def test_a_run_is_mirrored_whole(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    params = {"lr": 1e-3, "trainer.max_epochs": None, "compile": True, "long": "x" * 9000}
    params |= {f"param{i}": i for i in range(150)}
    tracker = build_tracker(to_mlflow(uri, experiment="an experiment"))
    dataset = DatasetInfo(name="book", digest="d" * 64, source="http://me:secret@host/book", documents=3, tokens=70)
    tracker.start(run_info(folder, params=params, tags={"note": "hello"}, dataset=dataset))
    RunDir(folder).config.write_text("lr: 0.001\n")
    RunDir(folder).plots.mkdir()
    (RunDir(folder).plots / "loss.png").write_bytes(b"a picture")
    for step in range(1, 1201):
        tracker.log(record(step, **{"val/loss": math.nan} if step == 7 else {}))
    end(folder, "early_stopped", objective=1.5, best_step=40)
    tracker.finish()

    run = mirrored(uri, folder)
    assert client_of(uri).get_experiment(run.info.experiment_id).name == "an experiment"
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (1_000_000, 2_000_000), "the run's own times"
    assert len(run.data.params) == 154
    assert {key: run.data.params[key] for key in ("lr", "trainer.max_epochs", "compile")} == {
        "lr": "0.001",
        "trainer.max_epochs": "null",
        "compile": "true",
    }
    assert run.data.tags["note"] == "hello"
    assert run.data.tags["status"] == "early_stopped"
    assert run.data.tags["mlflow.source.type"] == "LOCAL"
    assert history(uri, folder, "train/loss") == [(s, 1 / s, 1_000_000 + s * 1000) for s in range(1, 1201)]
    assert math.isnan(history(uri, folder, "val/loss")[0][1])
    summary = {key: value for key, value in run.data.metrics.items() if key.startswith("summary/")}
    assert summary == {"summary/objective": 1.5, "summary/best_step": 40.0}
    artifacts = client_of(uri).list_artifacts(run.info.run_id)
    assert sorted(artifact.path for artifact in artifacts) == ["config.yaml", "plots", "result.json"]
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, json.loads(logged.dataset.profile)) == ("book", {"num_documents": 3, "num_tokens": 70})
    assert "secret" not in logged.dataset.source
    assert [r.getMessage() for r in caplog.records if r.name.startswith("lmtrain")] == []


@pytest.mark.parametrize(
    ("status", "theirs"),
    [
        ("completed", "FINISHED"),
        ("pruned", "FINISHED"),
        ("interrupted", "KILLED"),
        ("diverged", "FAILED"),
        ("out_of_memory", "FAILED"),
        ("failed", "FAILED"),
    ],
)
def test_status(tmp_path: Path, uri: str, status: str, theirs: str) -> None:
    attempt(uri, tmp_path / "run", range(1, 2), status=status)
    run = mirrored(uri, tmp_path / "run")
    assert (run.info.status, run.data.tags["status"]) == (theirs, status)


def test_a_resumed_run_continues_without_duplicates(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "run"
    attempt(uri, folder, range(1, 11), status="interrupted", params={"lr": 1, "max_steps": 10})
    first = mirrored(uri, folder)
    truncate_after(folder / "metrics.jsonl", 6)
    attempt(uri, folder, range(7, 15), attempt=1, params={"lr": 1, "max_steps": 14, "new": 2})
    second = mirrored(uri, folder)
    assert second.info.run_id == first.info.run_id
    assert (second.info.status, second.data.tags["attempt"]) == ("FINISHED", "1")
    assert second.data.params == {"lr": "1", "max_steps": "10", "new": "2"}
    assert [step for step, _, _ in history(uri, folder, "train/loss")] == list(range(1, 15))


def test_what_a_killed_attempt_did_not_send_is_made_good(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "run"
    attempt(uri, folder, range(1, 4), status="interrupted")
    unsent = MetricsFile(folder / "metrics.jsonl")
    for step in range(4, 8):
        unsent.append(record(step))
    unsent.close()
    attempt(uri, folder, range(8, 10), attempt=1)
    assert [step for step, _, _ in history(uri, folder, "train/loss")] == list(range(1, 10))


def test_a_run_deleted_in_mlflow_is_made_anew(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "run"
    attempt(uri, folder, range(1, 4))
    deleted = mirrored(uri, folder).info.run_id
    client_of(uri).delete_run(deleted)
    attempt(uri, folder, range(4, 6), attempt=1)
    assert mirrored(uri, folder).info.run_id != deleted
    assert [step for step, _, _ in history(uri, folder, "train/loss")] == list(range(1, 6))


def test_the_runs_of_a_sweep_share_a_parent(tmp_path: Path, uri: str) -> None:
    sweep = tmp_path / "lr_sweep"
    for number in ("0000", "0001"):
        sweep.mkdir(exist_ok=True)
        attempt(uri, sweep / number, range(1, 3), sweep=SweepInfo.of(sweep, "my sweep"))
    parent = mirrored(uri, sweep)
    assert (parent.info.run_name, parent.info.status) == ("my sweep", "RUNNING")
    for number in ("0000", "0001"):
        assert mirrored(uri, sweep / number).data.tags["mlflow.parentRunId"] == parent.info.run_id

    table = sweep / "comparison.csv"
    table.write_text("run,objective\n")
    ending = SweepEnding(
        status="completed", time=3000.0, metrics={"best_objective": 1.25}, files=[table], best=sweep / "0001"
    )
    finish_sweep(to_mlflow(uri), sweep, ending)
    assert SweepEnding.read(sweep) == ending, "it is noted in the folder too"
    parent = mirrored(uri, sweep)
    assert (parent.info.status, parent.info.end_time) == ("FINISHED", 3_000_000)
    assert parent.data.metrics == {"summary/best_objective": 1.25}
    assert [a.path for a in client_of(uri).list_artifacts(parent.info.run_id)] == ["comparison.csv"]


def test_where_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(to_mlflow(None)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(to_mlflow(None)) == "http://host:5000"
    assert tracking_uri(to_mlflow("sqlite:////a/b.db")) == "sqlite:////a/b.db"
    assert redact("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert redact("http://host:5000") == "http://host:5000"
    assert redact("mysql://host/db?user=me&password=secret&ssl=1") == "mysql://host/db?user=me&password=***&ssl=1"


@pytest.mark.parametrize("kind", ["closed port", "no database"])
def test_a_place_that_cannot_be_used_costs_one_warning(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "notes.db").write_text("not a database, whatever its name says " * 50)
    place = {
        "closed port": f"http://127.0.0.1:{free_port()}",
        "no database": f"sqlite:///{tmp_path}/notes.db",
    }[kind]
    started = time.monotonic()
    attempt(place, tmp_path / "run", range(1, 50))
    assert time.monotonic() - started < 20
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("lmtrain")]
    assert len(warnings) == 1
    assert place in warnings[0]
    assert "metrics.jsonl has everything" in warnings[0]
    assert "\n" not in warnings[0]
    assert "lmtrain track sync" in warnings[0]


def test_an_address_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gopher://me:[*]+@somewhere is no address of MLflow: it must begin with"):
        build_tracker(to_mlflow("gopher://me:secret@somewhere"))
    for address in ("sqlite:///a.db", "postgresql+psycopg://host/db", "./mlruns", "databricks", "https://host"):
        build_tracker(to_mlflow(address))


def test_log_costs_the_training_thread_next_to_nothing(tmp_path: Path, uri: str) -> None:
    tracker = build_tracker(to_mlflow(uri))
    tracker.start(run_info(tmp_path / "run"))
    seconds = []
    for step in range(1, 2001):
        started = time.perf_counter()
        tracker.log(record(step))
        seconds.append(time.perf_counter() - started)
    end(tmp_path / "run", "completed")
    tracker.finish()
    assert statistics.median(seconds) < 50e-6


RUN_IN_A_PROCESS = """
import logging, os, sys, time
from pathlib import Path
logging.basicConfig(level=logging.INFO)
from lmtrain.config.schema import TrackingConfig
from lmtrain.run_dir import RunDir
from lmtrain.tracking.run_info import RunInfo, SweepInfo
from lmtrain.tracking.tracker import build_tracker
folder, sweep = Path(sys.argv[1]), Path(sys.argv[1]).parent
folder.mkdir(parents=True, exist_ok=True)
started = time.perf_counter()
tracker = build_tracker(TrackingConfig(mlflow=True))
about = dict(id=folder.name, name=folder.name, folder=folder, params={}, tags={}, origin={}, started=1.0)
tracker.start(RunInfo(**about, sweep=SweepInfo.of(sweep, "s")))
assert time.perf_counter() - started < 1, "start must not wait for the import of MLflow"
for step in range(1, 11):
    tracker.log({"step": step, "time": time.time(), "train/loss": 1.0})
RunDir(folder).write_result({"status": "completed", "objective": None, "best_step": None, "ended": 2.0})
tracker.finish()
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_processes", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_that_start_together_on_a_fresh_database_all_work_and_print_nothing(
    tmp_path: Path, num_processes: int
) -> None:
    folders = [tmp_path / "sweep" / f"{number:04d}" for number in range(num_processes)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUN_IN_A_PROCESS, str(folder)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder in folders
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == [""] * num_processes
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    parents = set()
    for folder in folders:
        assert len(history(uri, folder, "train/loss")) == 10
        run = mirrored(uri, folder)
        assert run.info.status == "FINISHED"
        parents.add(run.data.tags["mlflow.parentRunId"])
    assert parents == {mirrored(uri, tmp_path / "sweep").info.run_id}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock", "mlruns", "sweep"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real MLflow server on a free port of this machine."""
    server = MlflowServer(tmp_path / "server")
    try:
        server.start()
        yield server.uri
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_server_gets_metrics_and_artifacts(tmp_path: Path, server: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    tracker = build_tracker(to_mlflow(server))
    tracker.start(run_info(folder))
    for step in range(1, 101):
        tracker.log(record(step))
    end(folder, "completed")
    tracker.finish()
    assert [step for step, _, _ in history(server, folder, "train/loss")] == list(range(1, 101))
    run = mirrored(server, folder)
    assert run.info.status == "FINISHED"
    assert [a.path for a in client_of(server).list_artifacts(run.info.run_id)] == ["config.yaml", "result.json"]
    assert capfd.readouterr() == ("", "")
