"""What every tracker promises a run, held to what its makers' own readers find in it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mirrored_runs import attempt, end, record, run_info
from tracker_kinds import KINDS, Kind

from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import MetricsFile, read_metrics, truncate_after
from lmtrain.tracking.run_info import SweepInfo
from lmtrain.tracking.tracker import build_tracker


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database of MLflow for the module: creating the tables takes two seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def records(first: int, last: int) -> list[dict[str, float]]:
    return [record(step, **{"val/loss": 2 / step} if step % 5 == 0 else {}) for step in range(first, last + 1)]


def test_all_records_are_there_with_step_time_and_value(tmp_path: Path, kind: Kind, uri: str) -> None:
    strange = [
        record(40, **{"val/loss": math.nan}),
        record(41, **{"val/loss": math.inf, "val/perplexity": -math.inf}),
        record(42, **{"train/grad_norm": 1e-30, "train/lr": 0.1}),
    ]
    attempt(kind.config(uri), tmp_path / "run", written := [*records(1, 39), *strange])
    held = kind.held(tmp_path / "run", uri)
    assert [one.points for one in held] == kind.expected(written)


def test_two_records_of_one_step_are_both_there(tmp_path: Path, kind: Kind, uri: str) -> None:
    """One of training, one of the evaluation after it; both tell the tokens so far."""
    evaluation = {"step": 3, "tokens": 24, "time": 1003.5, "attempt": 0, "val/loss": 0.5}
    attempt(kind.config(uri), tmp_path / "run", [*records(1, 3), evaluation, *records(4, 6)])
    for one in kind.held(tmp_path / "run", uri):
        values = sorted((key, step, value) for key, step, _, value in one.points if step == 3)
        assert [(key, step) for key, step, _ in values] == [("tokens", 3), ("train/loss", 3), ("val/loss", 3)]
        assert [value for *_, value in values] == [24, pytest.approx(1 / 3), 0.5]


def test_params_and_status(tmp_path: Path, kind: Kind, uri: str) -> None:
    params = {"lr": 1e-3, "batch_size": 8, "model": "nano", "trainer.max_epochs": None, "compile": True}
    outcomes = {"completed": True, "early_stopped": True, "pruned": True}
    outcomes |= {"interrupted": False, "failed": False, "diverged": False, "out_of_memory": False}
    for status, succeeded in outcomes.items():
        attempt(kind.config(uri), tmp_path / status, records(1, 2), status=status, params=params)
        for one in kind.held(tmp_path / status, uri):
            assert one.succeeded == succeeded
            told = {key: str(value).lower() for key, value in one.params.items() if key in params}
            assert told.pop("trainer.max_epochs") in ("none", "null")
            assert told.pop("batch_size") in ("8", "8.0")
            assert told == {"lr": "0.001", "model": "nano", "compile": "true"}


def test_a_resumed_run_continues_without_loss_or_duplicates(tmp_path: Path, kind: Kind, uri: str) -> None:
    """It redoes steps after its checkpoint, as the run that was killed had gone on beyond it."""
    folder = tmp_path / "run"
    attempt(kind.config(uri), folder, records(1, 10), status="interrupted")
    truncate_after(RunDir(folder).metrics, 6)
    attempt(kind.config(uri), folder, records(7, 14), attempt=1)
    assert read_metrics(RunDir(folder).metrics) == records(1, 14)
    held = kind.held(folder, uri)
    assert [one.points for one in held] == kind.expected(records(1, 14))
    assert all(one.succeeded for one in held)


def test_what_a_killed_attempt_did_not_send_is_made_good(tmp_path: Path, kind: Kind, uri: str) -> None:
    folder = tmp_path / "run"
    attempt(kind.config(uri), folder, records(1, 3), status="interrupted")
    write(folder, records(4, 7))
    attempt(kind.config(uri), folder, records(8, 9), attempt=1)
    assert [one.points for one in kind.held(folder, uri)] == kind.expected(records(1, 9))


def test_a_run_that_was_not_mirrored_before_is_there_from_its_beginning(tmp_path: Path, kind: Kind, uri: str) -> None:
    run_info(tmp_path / "run")
    write(tmp_path / "run", records(1, 7))
    attempt(kind.config(uri), tmp_path / "run", records(8, 9), attempt=1)
    assert [one.points for one in kind.held(tmp_path / "run", uri)] == kind.expected(records(1, 9))


def write(folder: Path, unsent: list[dict[str, float]]) -> None:
    metrics = MetricsFile(RunDir(folder).metrics)
    for one in unsent:
        metrics.append(one)
    metrics.close()


def test_two_runs_of_one_process_both_arrive(tmp_path: Path, kind: Kind, uri: str) -> None:
    """At the same time, which a sweep with threads may ask for; one after the other is what other tests do."""
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    folders = [sweep / "0000", sweep / "0001"]
    trackers = [build_tracker(kind.config(uri)) for _ in folders]
    files = []
    for tracker, folder in zip(trackers, folders, strict=True):
        tracker.start(run_info(folder, sweep=SweepInfo.of(sweep, "a sweep")))
        files.append(MetricsFile(RunDir(folder).metrics))
    for one in records(1, 50):
        for tracker, file in zip(trackers, files, strict=True):
            file.append(one)
            tracker.log(one)
    for tracker, folder in zip(trackers, folders, strict=True):
        end(folder, "completed")
        tracker.finish()
    for folder in folders:
        assert [one.points for one in kind.held(folder, uri)] == kind.expected(records(1, 50))


def test_log_costs_the_training_thread_next_to_nothing(
    tmp_path: Path, kind: Kind, uri: str, record_property: Any
) -> None:
    tracker = build_tracker(kind.config(uri))
    tracker.start(run_info(tmp_path / "run"))
    seconds = []
    for step in range(1, 2001):
        one = record(step)
        started = time.perf_counter()
        tracker.log(one)
        seconds.append(time.perf_counter() - started)
    end(tmp_path / "run", "completed")
    tracker.finish()
    median, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    record_property("microseconds", {"median": median * 1e6, "99th percentile": p99 * 1e6})
    assert median <= 50e-6
    assert p99 <= 500e-6  # while other threads have the interpreter


BROKEN: Mapping[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb"}


@pytest.mark.parametrize("name", ["mlflow", *BROKEN])
def test_a_mirror_that_breaks_costs_one_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file is where its folder should be; text is where its database should be."""
    folder = tmp_path / "run"
    run_info(folder)
    (folder / BROKEN.get(name, "other")).write_text("in the way")
    (tmp_path / "notes.db").write_text("not a database, whatever its name says " * 50)
    attempt(KINDS[name].config(f"sqlite:///{tmp_path}/notes.db"), folder, records(1, 50))
    assert read_metrics(RunDir(folder).metrics) == records(1, 50)
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("lmtrain")]
    assert "the run goes on, metrics.jsonl has everything" in warning
    assert "\n" not in warning
    assert capfd.readouterr() == ("", "")


def test_one_that_breaks_does_not_disturb_the_others(tmp_path: Path, uri: str) -> None:
    folder, kind = tmp_path / "run", KINDS["several"]
    run_info(folder)
    (folder / "tensorboard").write_text("in the way")
    attempt(kind.config(uri), folder, records(1, 9))
    mlflow, _, wandb = kind.readers
    expected = kind.expected(records(1, 9))
    assert [mlflow(folder, uri).points, wandb(folder, uri).points] == [expected[0], expected[2]]


def test_nothing_is_printed(
    tmp_path: Path, kind: Kind, uri: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    attempt(kind.config(uri), tmp_path / "run", records(1, 20))
    assert capfd.readouterr() == ("", "")
    assert [r.getMessage() for r in caplog.records if r.name.startswith("lmtrain")] == []


def test_finish_without_start_does_nothing(kind: Kind, uri: str) -> None:
    build_tracker(kind.config(uri)).finish()
