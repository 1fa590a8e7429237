"""Processes of a sweep take their places on a machine: here one that says it has GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from pool_worker import what_it_sees
from trained_runs import settings

from lmtrain import places
from lmtrain.machine import count_gpus, visible_gpus
from lmtrain.places import Places, share_this_machine


def seen_by_workers(folder: Path, number: int) -> list[str | None]:
    """What each of so many joblib processes sees; each makes several runs."""
    shared = share_this_machine(number)
    folder.mkdir()
    found = Parallel(n_jobs=number)(delayed(what_it_sees)(shared, folder, run) for run in range(3 * number))
    by_process = {process: {seen for other, seen in found if other == process} for process, _ in found}
    assert all(len(seen) == 1 for seen in by_process.values())
    assert len(by_process) == number
    return sorted(next(iter(seen)) or "" for seen in by_process.values())


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("visible", "number", "expected"),
    [
        ("0,1", 3, ["0", "0", "1"]),
        ("GPU-8f6e,MIG-1b2c-9d", 2, ["GPU-8f6e", "MIG-1b2c-9d"]),
    ],
)
def test_each_worker_sees_its_own_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, number: int, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    get_reusable_executor().shutdown(wait=True)  # processes of an earlier test have places already
    assert seen_by_workers(tmp_path / "once", number) == expected
    assert seen_by_workers(tmp_path / "again", number) == expected
    get_reusable_executor().shutdown(wait=True, kill_workers=True)  # as if they had died
    assert seen_by_workers(tmp_path / "anew", number) == expected


def test_more_workers_than_gpus_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert share_this_machine(4).gpus == ("0", "1")
    assert "4 workers share 2 GPUs" in caplog.text
    caplog.clear()
    share_this_machine(2)
    assert caplog.text == ""


def test_one_worker_has_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    Places.of_this_machine(1).take()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_cores_are_shared_unless_a_run_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "available_cores", lambda: 8)
    assert Places(3).seat(settings("parallel.num_threads=null")).parallel.num_threads == 2
    assert Places(16).seat(settings("parallel.num_threads=null")).parallel.num_threads == 1
    assert Places(2).seat(settings("parallel.num_threads=1")).parallel.num_threads == 1


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", []),
        ("0,2", ["0", "2"]),
        (" 1 , 0", ["1", "0"]),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
        ("GPU-1a,MIG-2b", ["GPU-1a", "MIG-2b"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == expected
    assert count_gpus() == len(expected)
