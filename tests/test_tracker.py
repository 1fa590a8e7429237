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

from lmtrain.tracking import background, environment
from lmtrain.tracking.background import BackgroundTracker, Request
from lmtrain.tracking.environment import describe_environment, git_state
from lmtrain.tracking.metrics_file import MetricsFile
from lmtrain.tracking.run_info import RunInfo
from lmtrain.tracking.tracker import Trackers


def run_info(folder: Path) -> RunInfo:
    return RunInfo(id="1", name="run", folder=folder, params={}, tags={}, origin={}, started=0.0)


def record(step: int) -> dict[str, float]:
    return {"step": step, "tokens": step * 8, "time": 1000.0 + step, "attempt": 0, "train/loss": 1.0}


class FakeMirror:
    """Takes what it gets; a step in `refuse` raises, and so does everything while `away` is set."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.finished = False
        self.calls = 0
        self.away = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        self._answer()
        self.steps += [record["step"] for record in records]

    def finish(self) -> None:
        self._answer()
        self.finished = True

    def _answer(self) -> None:
        self.calls += 1
        self.hold.wait()
        if self.away.is_set():
            raise ConnectionRefusedError(111, "Connection refused")


def tracker_of(mirror: FakeMirror, close_timeout: float = 10.0) -> BackgroundTracker:
    return BackgroundTracker(
        server="the server",
        open_mirror=lambda info, request: mirror,
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
    monkeypatch.setattr(background, "FIRST_RETRY_SECONDS", 0.02)


def test_guard_warns_once_and_switches_the_mirror_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Whole:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def start(self, info: RunInfo) -> None:
            self.calls.append("start")

        def log(self, record: Mapping[str, float]) -> None:
            self.calls.append("log")

        def finish(self) -> None:
            self.calls.append("finish")

    class Broken(Whole):
        def log(self, record: Mapping[str, float]) -> None:
            super().log(record)
            raise RuntimeError("boom")

    broken, whole = Broken(), Whole()
    tracker = Trackers([broken, whole])
    tracker.start(run_info(tmp_path))
    for step in range(5):
        tracker.log(record(step))
    tracker.finish()
    assert broken.calls == ["start", "log"]
    assert whole.calls == ["start", *["log"] * 5, "finish"], "one that breaks does not disturb another"
    assert len(caplog.records) == 1
    assert "boom" in caplog.text


@pytest.mark.usefixtures("fast")
def test_everything_arrives_in_order(tmp_path: Path) -> None:
    mirror = FakeMirror()
    tracker = tracker_of(mirror)
    tracker.start(run_info(tmp_path))
    for step in range(500):
        tracker.log(record(step))
    tracker.log(record(500))
    tracker.finish()
    assert mirror.steps == list(range(501))
    assert mirror.finished


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
    tracker.finish()
    assert mirror.steps == list(range(20))
    assert mirror.finished
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
    tracker.finish()
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
    tracker.finish()
    assert 0.2 <= time.monotonic() - started < 2
    assert "within 0.2 s" in caplog.text
    mirror.hold.set()


@pytest.mark.usefixtures("fast")
def test_a_server_that_is_silent_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end of a run waits half a percent of its time for an answer, half a second at least."""
    release = threading.Event()

    class Silent(FakeMirror):
        def __init__(self, request: Request) -> None:
            super().__init__()
            self.request = request

        def log(self, records: Sequence[Mapping[str, float]]) -> None:
            with self.request.waiting():
                release.wait(20)

    tracker = BackgroundTracker(
        server="the server",
        open_mirror=lambda info, request: Silent(request),
        is_transient=lambda error: False,
        close_timeout=30,
        remedy="; see RUN",
    )
    tracker.start(run_info(tmp_path))
    tracker.log(record(1))
    started = time.monotonic()
    tracker.finish()
    assert 0.4 < time.monotonic() - started < 3
    release.set()
    assert caplog.records[0].getMessage() == (
        f"the server does not answer; the run goes on, metrics.jsonl has everything; see {tmp_path}"
    )


@pytest.mark.usefixtures("fast")
def test_the_queue_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "MAX_QUEUED", 10)
    mirror = FakeMirror()
    mirror.hold.clear()
    tracker = tracker_of(mirror)
    tracker.start(run_info(tmp_path))
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1000):
        metrics.append(record(step))
        tracker.log(record(step))
    assert tracker._messages.qsize() == 10
    mirror.hold.set()
    tracker.finish()
    assert set(mirror.steps) == set(range(1000)), "what the queue could not hold is read from the file"
    assert mirror.finished
    assert not caplog.records


@pytest.mark.usefixtures("fast")
def test_a_refusal_for_good_switches_the_mirror_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(info: RunInfo, request: Request) -> FakeMirror:
        raise ValueError("no such scheme")

    tracker = BackgroundTracker(
        server="the server", open_mirror=refuse, is_transient=lambda error: False, close_timeout=10
    )
    with caplog.at_level(logging.WARNING):
        tracker.start(run_info(tmp_path))
        tracker.log(record(1))
        tracker.finish()
    assert len(caplog.records) == 1
    assert "no such scheme" in caplog.text


def test_finish_without_start_does_nothing() -> None:
    tracker_of(FakeMirror()).finish()


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
