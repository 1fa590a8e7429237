"""What is told of a whole sweep before it is made, and what of one that cannot fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, CommandLine

from lmtrain import room
from lmtrain.commands import plan as command
from lmtrain.config.compose import compose_config
from lmtrain.config.corners import MAX_CORNERS, corners
from lmtrain.config.multirun import is_multirun
from lmtrain.config.search_space import parse_space
from lmtrain.errors import ConfigError, NotEnoughMemoryError
from lmtrain.planning import probe
from lmtrain.sweep.sizing import require_room_in_grid, require_room_in_study

HUGE = ("model.d_model=131072", "model.num_layers=64")
STUDY = ("hydra/sweeper=study", "lr=tag(log,interval(1e-3,1e-2))", "sweep.name=s")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert command.main(list(words)) == 0
    return capsys.readouterr().out


def record(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(told(capsys, "--json", *words))
    return content


def without(*names: str) -> list[str]:
    return [word for word in (*TINY, "data.path=x.txt") if not word.startswith(names)]


def test_a_grid_has_a_row_for_each_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = (*without("batch_size"), "lr=1e-3,3e-3", "batch_size=2,4", "optimizer=adamw,sgd", "trainer.max_steps=10")
    sweep = record(capsys, *words, "trainer.eval_batches=1", "--watts", "40")
    assert (sweep["kind"], sweep["runs"], sweep["steps"], sweep["fits"]) == ("grid", 8, 80, True)
    shapes = {tuple(shape["words"]): shape for shape in sweep["shapes"]}
    assert set(shapes) == {(f"batch_size={size}", f"optimizer={name}") for size in (2, 4) for name in ("adamw", "sgd")}
    assert all(shape["runs"] == 2 for shape in shapes.values()), "the learning rate changes no size"
    for (size, optimizer), shape in shapes.items():
        alone = record(capsys, *without("batch_size"), size, optimizer, "trainer.max_steps=10")
        assert shape["plan"]["memory"]["peak"] == alone["memory"]["peak"]
    mean = sum(shape["plan"]["time"]["seconds"] for shape in shapes.values()) / 4
    assert sweep["seconds_a_run"] == pytest.approx(mean)
    assert sweep["seconds"] == pytest.approx(8 * mean / sweep["at_once"])
    assert sweep["energy_kwh"] == pytest.approx(40 * sweep["seconds"] / 3.6e6)
    assert not list(tmp_path.iterdir())


def test_a_grid_is_told_with_what_cannot_be_run_or_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmtrain.planning import plan as planning

    monkeypatch.setenv("COLUMNS", "80")  # of a narrow terminal: reasons are told in full all the same
    text = told(capsys, *without("model.num_heads"), "model.num_heads=2,3", "seed=1,2")
    assert "4 runs" in text
    assert "\ncannot be run: model.num_heads=3: model.d_model (16) must be divisible by model.num_heads (3)\n" in text
    assert "each of them fits into" in text
    monkeypatch.setattr(planning, "available_memory", lambda: 0.6 * 2**30)
    text = told(capsys, "tracking=none", "model=nano,tiny")
    assert "1 of 2 shapes do not fit into 614.4 MiB" in text


def test_a_study_is_told_by_its_corners(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*without("batch_size"), *STUDY, "batch_size=choice(2,4,8)", "data.seq_len=range(8,17,8)"]
    sweep = record(capsys, *words, "hydra.sweeper.n_trials=7", "trainer.max_steps=10", "trainer.eval_batches=1")
    assert (sweep["kind"], sweep["name"], sweep["runs"]) == ("study", "s", 7)
    assert len(sweep["shapes"]) == 6, "both ends of a range, all of a choice, nothing of the learning rate"
    assert sweep["seconds"] > 0
    assert "7 trials" in told(capsys, *words, "hydra.sweeper.n_trials=7")
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_probed_shape_by_shape(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SECONDS", 0.1)
    words = (*without("batch_size"), "batch_size=2,4", "trainer.max_steps=10", "trainer.eval_batches=1", "--probe")
    sweep = record(capsys, *words)
    assert all(shape["plan"]["probe"]["seconds_a_step"] > 0 for shape in sweep["shapes"])
    assert sweep["seconds_a_run"] == pytest.approx(
        sum(shape["plan"]["time"]["seconds"] for shape in sweep["shapes"]) / 2
    )


@pytest.mark.parametrize(
    ("words", "several"),
    [
        (["lr=1e-3"], False),
        (["lr=1e-3,3e-3"], True),
        (["sweep=lr"], True),
        (["batch_size=choice(2,4)"], True),
        (["hydra/sweeper=study"], True),
        (["model.d_model=range(1,3)"], True),
        (["data.path='a,b'"], False),
        (["objective=[val/loss,run/seconds]"], False),
    ],
)
def test_words_tell_whether_there_are_several_runs(words: list[str], several: bool) -> None:
    assert is_multirun(words) is several


def test_devices_are_of_one_run() -> None:
    with pytest.raises(ConfigError, match="--devices is of one run"):
        command.main(["lr=1e-3,3e-3", "--devices", "2"])


def test_corners_are_both_ends_and_never_too_many() -> None:
    space = parse_space(None, ["lr=interval(1,2)", "dropout=interval(0,0.1)", "batch_size=choice(1,2,3)"])
    assert corners(space.distributions) == [
        {"dropout": dropout, "batch_size": size} for dropout in (0.0, 0.1) for size in (1, 2, 3)
    ]
    names = "model.d_model", "model.num_layers", "data.seq_len", "model.d_ff", "batch_size", "model.num_heads"
    many = parse_space(None, [f"{name}=choice(1,2,3,4)" for name in names])
    found = corners(many.distributions)
    assert MAX_CORNERS / 2 < len(found) <= MAX_CORNERS
    assert found == corners(many.distributions)


def test_a_grid_that_cannot_fit_is_refused_with_its_rows(
    lmtrain: CommandLine, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = [*without("data.path", "model.d_model"), f"data.path={corpus}", "model.d_model=16,32,1048576"]
    refused = lmtrain("--multirun", *grid, "seed=1,2", "trainer.max_steps=2", status=2)
    rows = "2 of 6 runs of this grid cannot be trained here: model.d_model=1048576 seed=1; model.d_model=1048576 seed=2"
    assert rows in refused.stderr
    assert "takes at least" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(lmtrain.folder.iterdir())


def test_a_study_that_cannot_fit_is_refused_before_its_text_is_read(lmtrain: CommandLine) -> None:
    refused = lmtrain("--multirun", *without("model.d_model", "model.num_layers"), *HUGE, *STUDY, status=2)
    assert "nothing that this study chooses from can be trained here: to train on one sequence" in refused.stderr
    assert not list(lmtrain.folder.iterdir())


def test_a_study_of_which_some_cannot_fit_goes_on_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = (compose_config(["tracking=none", f"model={name}"]) for name in ("nano", "small"))
    monkeypatch.setattr(room, "total_memory", lambda device: 2**30)
    points = [(["model=nano"], small), (["model=small"], large), (["model=odd"], "cannot be run")]
    with caplog.at_level(logging.WARNING):
        require_room_in_study(points)
    assert "trials near model=small find no room here and count as out of memory" in caplog.text
    with pytest.raises(NotEnoughMemoryError, match="nothing that this study chooses from"):
        require_room_in_study(points[1:])
    with pytest.raises(NotEnoughMemoryError, match="1 of 3 runs of this grid cannot be trained here: model=small"):
        require_room_in_grid(points)
    forced = compose_config(["tracking=none", "model=small", "force=true"])
    require_room_in_grid([(["model=small"], forced)])
    monkeypatch.setattr(room, "total_memory", lambda device: 2**40)
    require_room_in_grid(points)
