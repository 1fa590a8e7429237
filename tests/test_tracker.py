"""The guard around mirrors, the background thread with a mirror that misbehaves, the environment."""

from __future__ import annotations

import json
import logging
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmtrain.config.schema import MlflowConfig, NoTrackingConfig, TrackingConfig
from lmtrain.errors import ConfigError
from lmtrain.tracking import background, environment
from lmtrain.tracking.background import BackgroundTracker
from lmtrain.tracking.environment import describe_environment, git_state
from lmtrain.tracking.tracker import GuardedTracker, NoTracker, RunInfo, build_tracker


def run_info(folder: Path) -> RunInfo:
    return RunInfo(name="run", folder=folder, params={}, tags={})


def record(step: int) -> dict[str, float]:
    return {"step": step, "tokens": step * 8, "time": 1000.0 + step, "attempt": 0, "train/loss": 1.0}


class FakeMirror:
    """Takes what it gets; a step in `refuse` raises, and so does everything while `away` is set."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.artifacts: list[str] = []
        self.finished: tuple[str, Mapping[str, Any]] | None = None
        self.calls = 0
        self.away = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        self._answer()
        self.steps += [record["step"] for record in records]

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self._answer()
        self.artifacts.append(path.name)

    def finish(self, status: str, summary: Mapping[str, Any], end_time: float) -> None:
        self._answer()
        self.finished = (status, summary)

    def _answer(self) -> None:
        self.calls += 1
        self.hold.wait()
        if self.away.is_set():
            raise ConnectionRefusedError(111, "Connection refused")


def tracker_of(mirror: FakeMirror, close_timeout: float = 10.0) -> BackgroundTracker:
    return BackgroundTracker(
        server="the server",
        open_mirror=lambda info, start_time: mirror,
        is_transient=lambda error: isinstance(error, OSError),
        close_timeout=close_timeout,
    )


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "GATHER_SECONDS", 0.01)
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.02)


def test_build_tracker_follows_the_config() -> None:
    assert isinstance(build_tracker(NoTrackingConfig()), NoTracker)
    assert isinstance(build_tracker(MlflowConfig()), GuardedTracker)
    with pytest.raises(ConfigError, match="TrackingConfig"):
        build_tracker(TrackingConfig())


def test_guard_warns_once_and_switches_the_mirror_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(NoTracker):
        calls = 0

        def log(self, record: Mapping[str, float]) -> None:
            self.calls += 1
            raise RuntimeError("boom")

    broken = Broken()
    tracker = GuardedTracker(broken)
    tracker.start(run_info(tmp_path))
    for step in range(5):
        tracker.log(record(step))
    tracker.finish("completed", {})
    assert broken.calls == 1
    assert len(caplog.records) == 1
    assert "boom" in caplog.text


@pytest.mark.usefixtures("fast")
def test_everything_arrives_in_order(tmp_path: Path) -> None:
    mirror = FakeMirror()
    tracker = tracker_of(mirror)
    tracker.start(run_info(tmp_path))
    for step in range(500):
        tracker.log(record(step))
    tracker.log_artifact(tmp_path / "a.txt")
    tracker.log(record(500))
    tracker.finish("completed", {"objective": 1.0})
    assert mirror.steps == list(range(501))
    assert mirror.artifacts == ["a.txt"]
    assert mirror.finished == ("completed", {"objective": 1.0})


@pytest.mark.usefixtures("fast")
def test_a_server_that_was_away_gets_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirror = FakeMirror()
    mirror.away.set()
    tracker = tracker_of(mirror)
    tracker.start(run_info(tmp_path))
    for step in range(20):
        tracker.log(record(step))
    wait_until(lambda: mirror.calls >= 3)
    mirror.away.clear()
    tracker.finish("completed", {})
    assert mirror.steps == list(range(20))
    assert mirror.finished is not None
    assert [r.getMessage() for r in caplog.records] == [
        "the server cannot be used (ConnectionRefusedError: Connection refused); "
        "the run goes on, metrics.jsonl has everything"
    ]


@pytest.mark.usefixtures("fast")
def test_a_server_that_stays_away_does_not_hold_up_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirror = FakeMirror()
    mirror.away.set()
    tracker = tracker_of(mirror)
    tracker.start(run_info(tmp_path))
    tracker.log(record(1))
    started = time.monotonic()
    tracker.finish("completed", {})
    assert time.monotonic() - started < 5
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("fast")
def test_a_server_that_hangs_holds_up_the_end_for_close_timeout_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = FakeMirror()
    mirror.hold.clear()
    tracker = tracker_of(mirror, close_timeout=0.2)
    tracker.start(run_info(tmp_path))
    tracker.log(record(1))
    started = time.monotonic()
    tracker.finish("completed", {})
    assert 0.2 <= time.monotonic() - started < 2
    assert "within 0.2 s" in caplog.text
    mirror.hold.set()


@pytest.mark.usefixtures("fast")
def test_the_queue_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "MAX_QUEUED", 10)
    mirror = FakeMirror()
    mirror.hold.clear()
    tracker = tracker_of(mirror)
    tracker.start(run_info(tmp_path))
    for step in range(1000):
        tracker.log(record(step))
    mirror.hold.set()
    tracker.finish("completed", {})
    assert 10 <= len(mirror.steps) < 1000
    assert mirror.finished is not None
    assert "metrics.jsonl has everything" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("fast")
def test_a_refusal_for_good_switches_the_mirror_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(info: RunInfo, start_time: float) -> FakeMirror:
        raise ValueError("no such scheme")

    tracker = BackgroundTracker(
        server="the server", open_mirror=refuse, is_transient=lambda error: False, close_timeout=10
    )
    with caplog.at_level(logging.WARNING):
        tracker.start(run_info(tmp_path))
        tracker.log(record(1))
        tracker.finish("completed", {})
    assert len(caplog.records) == 1
    assert "no such scheme" in caplog.text


def test_finish_without_start_does_nothing() -> None:
    tracker_of(FakeMirror()).finish("failed", {})


def test_environment_is_plain_json() -> None:
    described = json.loads(json.dumps(describe_environment()))
    assert described["libraries"]["torch"]
    assert described["cpu_cores"] >= 1
    assert described["hostname"]


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    git("init", "-b", "trunk")
    assert git_state(tmp_path) is None, "there is no commit yet"
    file = tmp_path / "file.txt"
    file.write_text("one\n")
    git("add", "file.txt")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean is not None
    assert (clean.branch, clean.dirty, clean.diff, len(clean.commit)) == ("trunk", False, "", 40)

    file.write_text("two\n")
    git("add", "file.txt")
    changed = git_state(tmp_path)
    assert changed is not None
    assert changed.dirty
    assert "+two" in changed.diff, "staged changes belong to the diff"

    monkeypatch.setattr(environment, "MAX_DIFF_BYTES", 20)
    cut = git_state(tmp_path)
    assert cut is not None
    assert "[cut" in cut.diff
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None, "there is no git program"
