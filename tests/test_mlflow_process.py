"""The process that MLflow is in: how it comes, is asked, and goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import psutil
import pytest
from mirrored_runs import attempt, end, record, run_info

from lmtrain.config.schema import TrackingConfig
from lmtrain.run_dir import RunDir
from lmtrain.tracking.mlflow import process
from lmtrain.tracking.tracker import build_tracker

SCRIPT = """
import sys, time
from lmtrain.tracking.mlflow.process import mlflow_process
print(mlflow_process()._process.pid, flush=True)
{then}
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    process.end_mlflow_process()


def statuses(uri: str) -> dict[str, str]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("lmtrain")
    runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
    return {run.info.run_name: run.info.status for run in runs}


def gone(pid: int, seconds: float = 15.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_one_process_serves_the_runs_of_another_and_this_one_imports_nothing(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from mirrored_runs import attempt, record
from lmtrain.config.schema import TrackingConfig
from lmtrain.tracking.mlflow import process
pids = set()
for name in ("first", "second"):
    attempt(TrackingConfig(mlflow=True, uri={uri!r}), Path({str(tmp_path)!r}) / name, [record(1)])
    pids.add(process.mlflow_process()._process.pid)
print(len(pids), "mlflow" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "1 False", ended.stderr
    assert ended.stderr == ""
    assert statuses(uri) == {"first": "FINISHED", "second": "FINISHED"}


def test_a_run_goes_on_without_it_and_the_next_has_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrackingConfig(mlflow=True, uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracker = build_tracker(config)
    tracker.start(run_info(tmp_path / "first"))
    pid = process.mlflow_process()._process.pid
    os.kill(pid, signal.SIGKILL)
    tracker.log(record(1))
    end(tmp_path / "first", "completed")
    tracker.finish()
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("lmtrain")]
    assert "its process has ended" in warning
    assert "lmtrain track sync" in warning

    attempt(config, tmp_path / "second", [record(1)])
    assert statuses(str(config.uri))["second"] == "FINISHED"
    assert process.mlflow_process()._process.pid != pid


def test_what_it_has_to_say_is_logged_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrackingConfig(mlflow=True, uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    folder = tmp_path / "run"
    tracker = build_tracker(config)
    tracker.start(run_info(folder))
    (tmp_path / "mlruns").write_text("no folder")  # so that no file can be put there
    end(folder, "completed")
    tracker.finish()
    (told, *_) = [r for r in caplog.records if r.name == "lmtrain.tracking.mlflow.run"]
    assert "did not take" in told.getMessage()
    assert not RunDir(folder).in_use()


@pytest.mark.parametrize("then", ["time.sleep(60)", ""])
def test_it_ends_with_the_process_that_started_it(then: str, tmp_path: Path) -> None:
    script = SCRIPT.format(then=then)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if then:
            parent.kill()
        parent.wait()
        assert gone(pid)


def test_signals_for_the_run_do_not_end_it(tmp_path: Path) -> None:
    config = TrackingConfig(mlflow=True, uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    attempt(config, tmp_path / "first", [record(1)])
    pid = process.mlflow_process()._process.pid
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, name)
    attempt(config, tmp_path / "second", [record(1)])
    assert process.mlflow_process()._process.pid == pid
    assert statuses(str(config.uri)) == {"first": "FINISHED", "second": "FINISHED"}


def test_it_is_where_the_run_is_also_when_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses may be relative, and the environment may change between runs."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{name}.db")
        attempt(TrackingConfig(mlflow=True), tmp_path / name / "run", [record(1)])
    assert statuses(f"sqlite:///{tmp_path / 'b' / 'b.db'}") == {"run": "FINISHED"}
