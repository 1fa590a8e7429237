"""A run of a grid whose folder is there already: skipped, continued or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import TINY, snapshot

from lmtrain.config import compose
from lmtrain.config.schema import ExperimentConfig
from lmtrain.errors import RunFolderError
from lmtrain.origin import Origin
from lmtrain.run_dir import RunDir
from lmtrain.sweep.grid import run_in_grid

Settings = Callable[..., ExperimentConfig]


@pytest.fixture
def settings(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a tiny run by words of the command line, its text in `text.txt`."""
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(corpus.read_text())
    words = [f"data.path={tmp_path}/text.txt", *TINY, "trainer.max_steps=10", "trainer.sample_tokens=0"]
    return lambda *changes: compose.compose_config([*words, *changes])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sweep/0000"


def test_what_is_done_is_not_touched(settings: Settings, folder: Path) -> None:
    first = run_in_grid(settings(), folder, Origin())
    before = snapshot(folder)
    for unseen in ((), ("resume=auto",), ("tracking=mlflow",), ("trainer.log_every=3",)):
        assert run_in_grid(settings(*unseen), folder, Origin()) == first
    assert snapshot(folder) == before


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_what_was_cut_short_goes_on(settings: Settings, folder: Path, status: str) -> None:
    first = run_in_grid(settings(), folder, Origin())
    result = RunDir(folder).read_result()
    assert result is not None
    RunDir(folder).write_result(result | {"status": status})
    again = run_in_grid(settings(), folder, Origin())
    assert (again.status, again.step, again.objective) == ("completed", 10, first.objective)


def test_other_settings_are_refused_and_the_run_left_alone(settings: Settings, folder: Path) -> None:
    run_in_grid(settings(), folder, Origin())
    before = snapshot(folder)
    for change, difference in (("lr=0.5", "lr 0.006 → 0.5"), ("trainer.max_steps=20", "trainer.max_steps 10 → 20")):
        with pytest.raises(RunFolderError, match=f"already holds a run of other settings: {difference}"):
            run_in_grid(settings(change), folder, Origin())
    with pytest.raises(RunFolderError, match="cannot be continued otherwise than it was begun: lr"):
        run_in_grid(settings("lr=0.5", "resume=auto"), folder, Origin())
    assert snapshot(folder) == before
    assert run_in_grid(settings("trainer.max_steps=20", "resume=auto"), folder, Origin()).step == 20


def test_another_text_is_another_run(settings: Settings, folder: Path, tmp_path: Path) -> None:
    run_in_grid(settings(), folder, Origin())
    text = tmp_path / "text.txt"
    moved = tmp_path / "moved.txt"
    moved.write_text(text.read_text())
    before = snapshot(folder)
    assert run_in_grid(settings(f"data.path={moved}"), folder, Origin()).status == "completed", (
        "the same text elsewhere"
    )
    text.write_text(text.read_text() * 2)
    with pytest.raises(RunFolderError, match="other settings: the text is not the same"):
        run_in_grid(settings(), folder, Origin())
    assert snapshot(folder) == before


def test_a_run_whose_checkpoints_were_deleted_is_done_all_the_same(settings: Settings, folder: Path) -> None:
    first = run_in_grid(settings(), folder, Origin())
    better = settings("lr=0.02", "sweep.keep_checkpoints=1")
    assert run_in_grid(better, folder.with_name("0001"), Origin()).objective < first.objective  # type: ignore[operator]
    assert not list(folder.glob("checkpoints/step_*"))
    assert run_in_grid(settings(), folder, Origin()) == first


def test_a_smaller_number_of_checkpoints_counts_when_the_grid_is_typed_again(settings: Settings, folder: Path) -> None:
    run_in_grid(settings(), folder, Origin())
    run_in_grid(settings("lr=0.02"), folder.with_name("0001"), Origin())
    keep_one = dataclasses.replace(settings().sweep, keep_checkpoints=1)
    run_in_grid(dataclasses.replace(settings(), sweep=keep_one), folder, Origin())
    assert not list(folder.glob("checkpoints/step_*"))
