"""What a run folder keeps for its mirrors, and what is made of folders that lack it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from pathlib import Path

import pytest

from lmtrain.errors import RunFolderError
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import MetricsFile
from lmtrain.tracking.run_info import DIED, DatasetInfo, RunEnding, RunInfo, SweepEnding, SweepInfo
from lmtrain.tracking.system_metrics import SystemMetrics


def info_of(folder: Path) -> RunInfo:
    folder.mkdir(parents=True, exist_ok=True)
    dataset = DatasetInfo(name="book", digest="abc", source="book.txt", documents=1, tokens=9)
    about = {"params": {"lr": 0.1, "schedule": None}, "tags": {"data": "book"}, "origin": {"host": "here"}}
    return RunInfo(id="1f", name="run", folder=folder, started=5.0, attempt=2, dataset=dataset, **about)  # type: ignore[arg-type]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    info.write()
    assert RunInfo.read(tmp_path) == info


def test_a_run_of_a_sweep_belongs_to_it_wherever_they_are_moved(tmp_path: Path) -> None:
    sweep_folder = tmp_path / "there"
    run = sweep_folder / "confirm" / "0000"
    run.mkdir(parents=True)
    sweep = SweepInfo.of(sweep_folder, "rates")
    assert (sweep.name, SweepInfo.of(sweep_folder, "another name")) == ("rates", sweep)
    dataclasses.replace(info_of(run), sweep=sweep).write()
    assert RunInfo.read(run).sweep == sweep
    moved = sweep_folder.rename(tmp_path / "here")
    assert RunInfo.read(moved / "confirm" / "0000").sweep == dataclasses.replace(sweep, folder=moved)
    alone = (moved / "confirm" / "0000").rename(tmp_path / "alone")
    assert RunInfo.read(alone).sweep is None


def _identify(folder: Path) -> str:
    return SweepInfo.of(folder).id


@pytest.mark.multiprocess
def test_processes_that_start_together_agree_on_a_sweep(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(_identify, [tmp_path] * 8))) == 1


def test_how_a_sweep_ended(tmp_path: Path) -> None:
    SweepInfo.of(tmp_path)
    assert SweepEnding.read(tmp_path) is None
    table, gone = tmp_path / "comparison.csv", tmp_path / "plots" / "gone.png"
    table.touch()
    ending = SweepEnding(
        status="completed", time=7.5, metrics={"best": 1.0}, files=[table, gone], best=tmp_path / "0003"
    )
    ending.write(tmp_path)
    read = SweepEnding.read(tmp_path)
    assert read is not None
    assert (read.status, read.time, read.metrics, read.best) == ("completed", 7.5, {"best": 1.0}, tmp_path / "0003")
    assert read.files == [table], "what is gone is not shown"


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    RunDir(tmp_path).description.write_text('{"id": "1')
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        RunInfo.read(tmp_path)


def make_earlier_run(folder: Path) -> RunDir:
    """A run of the time before `run.json`."""
    folder.mkdir(parents=True)
    run = RunDir(folder)
    run.config.write_text("lr: 0.01\ndropout: 0.1\nbatch_size: 4\nseed: 3\nmodel: {d_model: 8}\n")
    metrics = MetricsFile(run.metrics)
    for step, attempt in ((1, 0), (2, 0), (3, 1)):
        metrics.append({"step": step, "tokens": step, "time": 100.0 + step, "attempt": attempt, "train/loss": 1.0})
    metrics.close()
    return run


def test_an_earlier_run_tells_what_it_can_and_the_same_each_time(tmp_path: Path) -> None:
    run = make_earlier_run(tmp_path / "old")
    words = ["model.d_model=8", "+lr=0.01"]
    run.write_result({"status": "completed", "objective": 1.0, "best_step": 2, "overrides": words})
    info = RunInfo.read(run.path)
    assert info.params == {"model.d_model": "8", "lr": 0.01, "dropout": 0.1, "batch_size": 4, "seed": 3}
    assert (info.started, info.attempt, info.name) == (101.0, 1, "old")
    assert RunInfo.read(run.path) == info
    moved = run.path.rename(tmp_path / "moved")
    assert RunInfo.read(moved).id == info.id


def test_how_a_run_ended(tmp_path: Path) -> None:
    run = make_earlier_run(tmp_path / "run")
    died = RunEnding.read(run.path)
    assert (died.status, died.summary) == (DIED, {})
    assert died.time == run.metrics.stat().st_mtime
    run.write_result({"status": "diverged", "objective": None, "best_step": 2, "ended": 123.0})
    ended = RunEnding.read(run.path)
    assert (ended.status, ended.time, ended.summary) == ("diverged", 123.0, {"best_step": 2})
    content = json.loads(run.result.read_text())
    del content["ended"]
    run.write_result(content)
    assert RunEnding.read(run.path).time == run.result.stat().st_mtime


def test_the_machine_is_looked_at_while_a_run_trains() -> None:
    with SystemMetrics(0.05) as system:
        deadline = time.monotonic() + 10
        while not (sample := system.newest()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert 0 <= sample["system/cpu_utilization_percentage"] <= 100
    assert 0 < sample["system/system_memory_usage_percentage"] < 100
    assert sample["system/system_memory_usage_megabytes"] > 100
    system._thread.join(10)
    system.newest()
    assert system.newest() == {}, "a sample is told once"
    with SystemMetrics(None) as never:
        time.sleep(0.05)
        assert never.newest() == {}
