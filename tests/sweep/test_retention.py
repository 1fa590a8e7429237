"""Which runs of a sweep keep their checkpoints, while several processes end runs at once."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from command_line import TINY, CommandLine

from lmtrain.errors import CheckpointError
from lmtrain.run import RunResult
from lmtrain.run_dir import RunDir
from lmtrain.sweep.retention import keep_best_checkpoints
from lmtrain.training.checkpoint import CheckpointFolder


def run_folder(sweep: Path, name: str, objective: float | None, status: str | None = "completed") -> RunDir:
    """A run with two checkpoints that ended so; a status of None: it has not ended."""
    folder = RunDir(sweep / name)
    for step in (10, 20):
        (folder.checkpoints / f"step_{step:08d}").mkdir(parents=True)
        (folder.checkpoints / f"step_{step:08d}/model.safetensors").write_bytes(b"weights")
    for link in ("last", "best"):
        (folder.checkpoints / link).symlink_to("step_00000020")
    folder.config.write_text("lr: 1\n")
    if status is not None:
        counts = {"best_step": 20, "step": 20, "tokens": 1, "seconds": 1.0, "metrics": {}, "last_score": objective}
        objectives = {"val/loss": objective}
        content = {"status": status, "objective": objective, "objectives": objectives, **counts}
        assert content.keys() == RunResult.__dataclass_fields__.keys()
        folder.write_result(content)
    return folder


def keeping(sweep: Path) -> list[str]:
    """Names of the runs with checkpoints."""
    return sorted(path.name for path in sweep.iterdir() if list(path.glob("checkpoints/step_*")))


def test_the_best_so_far_keep_theirs(tmp_path: Path) -> None:
    for name, objective in (("0000", 3.0), ("0001", 1.0)):
        run_folder(tmp_path, name, objective)
    assert keep_best_checkpoints(tmp_path, 2) == []
    run_folder(tmp_path, "0002", 2.0)
    assert keep_best_checkpoints(tmp_path, 2) == [tmp_path / "0000"]
    assert keeping(tmp_path) == ["0001", "0002"]
    left = sorted(path.name for path in (tmp_path / "0000").iterdir() if path.name[0] != ".")
    assert left == ["checkpoints", "config.yaml", "result.json"]
    assert [path.name for path in (tmp_path / "0000/checkpoints").iterdir()] == ["REMOVED.txt"]
    assert keep_best_checkpoints(tmp_path, 2) == [], "done already"


def test_a_run_that_was_given_up_comes_after_those_that_came_to_their_end(tmp_path: Path) -> None:
    run_folder(tmp_path, "0000", 1.0, "pruned")
    run_folder(tmp_path, "0001", None, "out_of_memory")
    run_folder(tmp_path, "0002", 2.0)
    keep_best_checkpoints(tmp_path, 2)
    assert keeping(tmp_path) == ["0000", "0002"]
    run_folder(tmp_path, "0003", 3.0, "early_stopped")
    keep_best_checkpoints(tmp_path, 2)
    assert keeping(tmp_path) == ["0002", "0003"]


def test_what_is_to_go_on_keeps_its_checkpoints(tmp_path: Path) -> None:
    run_folder(tmp_path, "0000", 9.0, status=None)
    run_folder(tmp_path, "0001", 9.0, status="interrupted")
    run_folder(tmp_path, "0002", 9.0, status="failed")
    for number in range(3, 6):
        run_folder(tmp_path, f"{number:04d}", 1.0)
    worse = run_folder(tmp_path, "0006", 8.0)
    worse.lock()  # somebody resumes it with a larger budget
    keep_best_checkpoints(tmp_path, 1)
    assert keeping(tmp_path) == ["0000", "0001", "0002", "0003", "0006"]
    worse.unlock()
    keep_best_checkpoints(tmp_path, 1)
    assert keeping(tmp_path) == ["0000", "0001", "0002", "0003"]


def _end_runs(sweep: Path, numbers: list[int]) -> None:
    for number in numbers:
        run_folder(sweep, f"{number:04d}", float((number * 7) % 40))
        keep_best_checkpoints(sweep, 3)


@pytest.mark.multiprocess
def test_workers_that_end_runs_at_once_keep_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_end_runs, args=(tmp_path, list(range(start, 40, 4)))) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    best = sorted(range(40), key=lambda number: (number * 7) % 40)[:3]
    assert keeping(tmp_path) == sorted(f"{number:04d}" for number in best)


def test_an_emptied_folder_says_why(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "0000", 1.0)
    checkpoints = CheckpointFolder(folder.checkpoints)
    checkpoints.require_not_removed()
    checkpoints.remove_all("a sweep kept others")
    assert not checkpoints.has_any()
    for read in (checkpoints.load, checkpoints.require_not_removed):
        with pytest.raises(CheckpointError, match=r"was emptied: a sweep kept others\ntrain it again .*--config-name"):
            read()


def test_a_sweep_keeps_the_best_and_refuses_to_resume_the_others(lmtrain: CommandLine, corpus: Path) -> None:
    grid = ["--multirun", f"data.path={corpus}", *TINY, "trainer.max_steps=20", "trainer.eval_every=20"]
    lmtrain(*grid, "lr=1e-5,1e-2,1e-4", "sweep.name=kept", "sweep.keep_checkpoints=1")
    sweep = lmtrain.folder / "multirun/kept"
    assert keeping(sweep) == ["0001"]
    refused = lmtrain("resume=multirun/kept/0000", "trainer.max_steps=40", status=2)
    assert "sweep.keep_checkpoints=1 keeps those of the best runs" in refused.stderr
    assert refused.stderr.count("\n") == 2
    result = json.loads((sweep / "0000/result.json").read_text())
    assert (result["status"], result["step"]) == ("completed", 20), "the refusal left everything as it was"
