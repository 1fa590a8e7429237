"""What `resume` makes of run folders that kills, full disks, other versions and people have been at."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import TINY, snapshot
from full_disk import on_a_small_disk

from lmtrain.commands.verify_resume import compare_ends
from lmtrain.config.compose import compose_config
from lmtrain.errors import CheckpointError, Interrupted, LmtrainError, NewerFormatError, RunError, RunFolderError
from lmtrain.run import RunResult, run_experiment
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import MetricsFile

STEPS = 12
LONG = (
    *(f"trainer.max_steps={STEPS}", "trainer.eval_every=6", "trainer.checkpoint_every=3", "trainer.log_every=1"),
    *("dropout=0.1", "precision=fp32", "device=cpu", "trainer.keep_checkpoints=3"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run; copy it before use."""
    folder = tmp_path_factory.mktemp("resume") / "whole"
    words = [*TINY, *LONG, f"data.path={corpus}", f"data.cache_dir={folder.parent / 'cache'}"]
    run_experiment(compose_config(words), folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def resume(run: Path, *words: str) -> RunResult:
    return run_experiment(compose_config([f"resume={run}", *words]), run)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def test_a_signal_that_comes_with_the_metrics_file_is_heeded(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the file to be there may send one at once."""

    class WatchedFile(MetricsFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("lmtrain.run.MetricsFile", WatchedFile)
    words = [*TINY, *LONG, f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(Interrupted, match="stopped by SIGINT at step 1; go on with resume="):
        run_experiment(compose_config(words), tmp_path / "run")


def forget_the_end(run: Path) -> None:
    """As if killed before its result was written."""
    (run / "result.json").unlink()


# ------------------------------------------------------------------------------------------------- damage


def truncate(checkpoint: Path) -> None:
    with (checkpoint / "training_state.safetensors").open("r+b") as file:
        file.truncate(1000)


def edit(checkpoint: Path) -> None:
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["progress"]["best_score"] = 0.0
    (checkpoint / "meta.json").write_text(json.dumps(meta))


def tear_out(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, edit, tear_out])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    whole: Path, run: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    forget_the_end(run)
    damage(newest(run))
    assert resume(run).status == "completed"
    assert f"{newest(run).name}" in caplog.text
    assert "damaged" in caplog.text
    assert compare_ends(RunDir(whole), RunDir(run)) == []


def refused(run: Path, error: type[LmtrainError], *words: str) -> str:
    """The message of a refusal that changes nothing."""
    before = snapshot(run)
    with pytest.raises(error) as caught:
        resume(run, *words)
    changed = {name for name, _ in before.items() ^ snapshot(run).items()}
    assert changed <= {".", ".lock"}
    assert caught.value.exit_status == 2
    assert str(caught.value).count("\n") <= 1
    return str(caught.value)


def test_without_a_sound_checkpoint_it_is_refused(run: Path) -> None:
    forget_the_end(run)
    for checkpoint in (run / "checkpoints").glob("step_*"):
        truncate(checkpoint)
    assert "no sound checkpoint" in refused(run, CheckpointError)


def test_a_checkpoint_of_a_newer_version_is_refused(run: Path) -> None:
    manifest = newest(run) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    message = refused(run, NewerFormatError, "trainer.max_steps=20")
    assert "written by a newer version of lmtrain (format 2, this one reads up to 1)" in message


def test_another_architecture_is_refused_even_by_force(run: Path) -> None:
    assert "model.d_model 16 → 32" in refused(run, RunFolderError, "model.d_model=32")
    assert "the checkpoint is of another model" in refused(run, CheckpointError, "model.d_model=32", "force=true")


def test_a_folder_in_use_is_refused(run: Path) -> None:
    other = RunDir(run)
    other.lock()
    try:
        assert "is in use by another process" in refused(run, RunFolderError, "trainer.max_steps=20")
    finally:
        other.unlock()


# ------------------------------------------------------------------------------------------------- ends


def test_a_run_killed_after_its_last_checkpoint_gets_its_result(whole: Path, run: Path) -> None:
    forget_the_end(run)
    (run / "checkpoints" / "last").unlink()  # the kill came before the links
    (run / "checkpoints" / "best").unlink()
    assert resume(run).status == "completed"
    assert compare_ends(RunDir(whole), RunDir(run)) == []
    ours, theirs = (RunDir(folder).read_result() or {} for folder in (run, whole))
    assert ours["metrics"].keys() == theirs["metrics"].keys()


def test_every_difference_between_two_ends_is_found(whole: Path, run: Path) -> None:
    """A comparison that never fails would prove nothing."""
    assert compare_ends(RunDir(whole), RunDir(run)) == []
    metrics, manifest = run / "metrics.jsonl", run / "checkpoints" / "best" / "manifest.json"
    for path, old, new in (
        (metrics, '"train/loss": ', '"train/loss": 1'),
        (manifest, '"model.safetensors": "', '"model.safetensors": "0'),
        (run / "result.json", '"best_step": ', '"best_step": 1'),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        assert len(compare_ends(RunDir(whole), RunDir(run))) >= 1, path
        path.write_text(text)
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert "metrics: 14 against 13 records" in compare_ends(RunDir(whole), RunDir(run))


# ------------------------------------------------------------------------------------------------- full disks


def raise_full_disk(*arguments: object, **settings: object) -> None:
    raise OSError(28, "No space left on device", "somewhere")


def test_a_full_disk_ends_a_run_with_its_result(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = newest(run).name
    monkeypatch.setattr("lmtrain.tracking.metrics_file.MetricsFile.append", raise_full_disk)
    with pytest.raises(RunError, match="the disk is full, cannot write somewhere; make room, then") as caught:
        resume(run, "trainer.max_steps=20", "force=true")
    assert str(caught.value).endswith(f"resume={run}")
    assert caught.value.exit_status == 1
    result = RunDir(run).read_result()
    assert result is not None
    assert (result["status"], result["error"]) == ("failed", "OSError: [Errno 28] No space left on device: 'somewhere'")
    assert newest(run).name == last
    monkeypatch.undo()
    assert resume(run, "trainer.max_steps=20", "force=true").step == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "checkpoints"),
    [(16, 0), (60, 0), (400, 0), (1000, 1)],
    ids=["no result fits", "no metrics fit", "no checkpoint fits", "one checkpoint fits"],
)
def test_a_small_disk(tmp_path: Path, corpus: Path, kilobytes: int, checkpoints: int) -> None:
    words = [*TINY, *LONG, f"data.path={corpus}", "model.d_model=64", "hydra.run.dir=disk/run"]
    command = f"{sys.executable} -m lmtrain {' '.join(words)}"
    script = f'{command}; echo "status $?"; cp -a disk/run copy; {sys.executable} -m lmtrain resume=disk/run'
    done = on_a_small_disk(tmp_path, kilobytes, script)
    assert "status 1\n" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    copy = tmp_path / "copy"
    if kilobytes == 16:
        assert "the disk is full, cannot write disk/run; make room" in done.stderr
        assert not copy.exists()
        return
    result = RunDir(copy).read_result()
    assert result is not None
    assert result["status"] == "failed"
    assert len(list(copy.glob("checkpoints/step_*"))) == checkpoints
    assert not list(copy.glob("checkpoints/.*.partial"))
    if checkpoints:
        assert resume(copy).status == "completed"
