"""A grid: several runs by one command, wrong points among right ones, what it leaves behind, and the command again."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import TINY, CommandLine, snapshot

from lmtrain.run_dir import RunDir

Grid = tuple[CommandLine, Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def words(corpus: Path) -> list[str]:
    return ["--multirun", f"data.path={corpus}", *TINY, "trainer.eval_every=20"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Grid:
    """Two learning rates, mirrored to MLflow; the second is the better one."""
    lmtrain = CommandLine(tmp_path_factory.mktemp("grid"))
    mirrored = [word for word in words if word != "tracking=none"]
    done = lmtrain(*mirrored, "trainer.max_steps=20", "lr=1e-5,1e-2", "sweep.name=rates", COLUMNS="120")
    return lmtrain, lmtrain.folder / "multirun/rates", done


def result_of(folder: Path) -> dict[str, Any]:
    found = RunDir(folder).read_result()
    assert found is not None
    return found


def rows_of(sweep_dir: Path) -> list[dict[str, str]]:
    with (sweep_dir / "comparison.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------- a grid


def test_a_grid_is_a_run_of_each_point(grid: Grid) -> None:
    _, sweep_dir, _ = grid
    assert sorted(path.name for path in sweep_dir.iterdir() if path.is_dir()) == ["0000", "0001", "plots"]
    saved = [yaml.safe_load((sweep_dir / name / "config.yaml").read_text()) for name in ("0000", "0001")]
    assert [config["lr"] for config in saved] == [1e-5, 1e-2]
    assert [result_of(sweep_dir / name)["status"] for name in ("0000", "0001")] == ["completed"] * 2


def test_a_grid_ends_in_a_table_sorted_by_objective(grid: Grid) -> None:
    _, sweep_dir, done = grid
    lines = done.stdout[done.stdout.index("2 runs by val/loss") :].splitlines()
    listed = [line.split() for line in lines if line.split()[:1] in (["0000"], ["0001"])]
    best, worst = result_of(sweep_dir / "0001")["objective"], result_of(sweep_dir / "0000")["objective"]
    found = [(run, float(lr), objective) for run, lr, objective, *_ in listed]
    assert found == [("0001", 1e-2, f"{best:.4f}"), ("0000", 1e-5, f"{worst:.4f}")]
    assert best < worst
    assert done.stderr == ""


def test_a_grid_leaves_its_comparison_behind(grid: Grid) -> None:
    _, sweep_dir, _ = grid
    rows = rows_of(sweep_dir)
    found = [(row["run"], float(row["lr"]), row["status"]) for row in rows]
    assert found == [("0001", 1e-2, "completed"), ("0000", 1e-5, "completed")]
    assert [float(row["val/loss"]) for row in rows] == [
        result_of(sweep_dir / row["run"])["metrics"]["val/loss"] for row in rows
    ]
    assert (sweep_dir / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert {"comparison.png", "objective.png"} <= {path.name for path in (sweep_dir / "plots").iterdir()}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (sweep_dir / "plots").iterdir())


def test_mlflow_gets_every_run_of_a_grid_below_one_parent(grid: Grid) -> None:
    from mlflow import MlflowClient

    lmtrain, sweep_dir, _ = grid
    client = MlflowClient(f"sqlite:///{lmtrain.folder}/mlflow.db")

    def mirrored(folder: Path) -> Any:
        return client.get_run(json.loads((folder / "mlflow_run.json").read_text())["run_id"])

    parent = mirrored(sweep_dir)
    children = [mirrored(sweep_dir / name) for name in ("0000", "0001")]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert [child.data.tags["trial"] for child in children] == ["0", "1"]
    assert [run.info.run_name for run in (parent, *children)] == ["rates", "0000 rates", "0001 rates"]
    assert {run.data.tags["mlflow.source.name"] for run in (parent, *children)} == {"python -m lmtrain"}
    assert {child.data.tags["study"] for child in children} == {"rates"}
    assert {"comparison.csv", "report.html"} <= {
        artifact.path for artifact in client.list_artifacts(parent.info.run_id)
    }

    assert [float(child.data.params["lr"]) for child in children] == [1e-5, 1e-2]
    best = client.get_logged_model(parent.outputs.model_outputs[0].model_id)
    assert best.params == children[1].data.params
    chosen = {"tokenizer": "byte", "model.d_model": "16", "batch_size": "4"}
    measured = result_of(sweep_dir / "0001")["metrics"]["val/loss"]
    assert chosen.items() <= children[1].data.params.items()
    assert children[1].data.metrics["val/loss"] == measured
    artifacts = {artifact.path for artifact in client.list_artifacts(children[1].info.run_id)}
    assert {"config.yaml", "result.json", "lmtrain.log", "plots"} <= artifacts


def test_the_right_points_of_a_grid_are_run_and_the_wrong_ones_told(lmtrain: CommandLine, words: list[str]) -> None:
    done = lmtrain(*words, "trainer.max_steps=20", "model.num_heads=3,2", "sweep.name=heads", status=2)
    sweep_dir = lmtrain.folder / "multirun/heads"
    (row,) = rows_of(sweep_dir)
    assert (row["run"], row["status"]) == ("0001", "completed")
    assert yaml.safe_load((sweep_dir / "0001/config.yaml").read_text())["model"]["num_heads"] == 2
    assert "lmtrain: model.d_model (16) must be divisible by model.num_heads (3)" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (sweep_dir / "0000").exists()


# --------------------------------------------------------------------------------------------- typed again


@pytest.fixture
def rates(words: list[str]) -> list[str]:
    return [*words, "trainer.max_steps=20", "sweep.name=rates"]


def test_a_grid_typed_again_makes_only_what_is_new(lmtrain: CommandLine, rates: list[str]) -> None:
    lmtrain(*rates, "lr=1e-3,1e-2")
    sweep_dir = lmtrain.folder / "multirun/rates"
    before = {name: snapshot(sweep_dir / name) for name in ("0000", "0001")}
    done = lmtrain(*rates, "lr=1e-3,1e-2,2e-2")
    assert before == {name: snapshot(sweep_dir / name) for name in before}, "what is done is not touched"
    for name in before:
        assert f"multirun/rates/{name} is there already: completed at step 20" in done.stdout
    assert {row["run"] for row in rows_of(sweep_dir)} == {"0000", "0001", "0002"}
    assert "3 runs by val/loss" in done.stdout


@pytest.mark.slow
def test_a_grid_that_was_stopped_goes_on_when_typed_again(lmtrain: CommandLine, words: list[str]) -> None:
    mirrored = [word for word in words if word != "tracking=none"]
    grid = [*mirrored, "lr=1e-3,1e-2", "trainer.checkpoint_every=20", "sweep.name=rates"]
    sweep_dir = lmtrain.folder / "multirun/rates"
    long = [*grid, "trainer.max_steps=2000"]
    with lmtrain.start(*long) as process:
        wait_for(lambda: (sweep_dir / "0000/checkpoints/last").exists() and (sweep_dir / "mlflow_run.json").exists())
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command with sweep.name=rates goes on" in out
    stopped_at = result_of(sweep_dir / "0000")["step"]
    assert 20 <= stopped_at < 2000
    assert status_in_mlflow(lmtrain, sweep_dir) == status_in_mlflow(lmtrain, sweep_dir / "0000") == "KILLED"
    assert not (sweep_dir / "0001").exists()

    shorter = stopped_at + 20
    lmtrain(*grid, f"trainer.max_steps={shorter}", "resume=auto")
    results = [result_of(sweep_dir / name) for name in ("0000", "0001")]
    assert [(result["status"], result["step"]) for result in results] == [("completed", shorter)] * 2
    assert [result["attempt"] for result in results] == [1, 0], "the first went on, the second began"
    assert status_in_mlflow(lmtrain, sweep_dir) == "FINISHED"


def test_sweep_settings_without_multirun_are_remarked_upon(lmtrain: CommandLine, words: list[str]) -> None:
    done = lmtrain(*words[1:], "trainer.max_steps=20", "sweep.name=rates")
    assert done.stdout.count("this makes one run: what sweep says is for --multirun") == 1
    assert not (lmtrain.folder / "multirun").exists()


def status_in_mlflow(lmtrain: CommandLine, folder: Path) -> str:
    from mlflow import MlflowClient

    run_id = json.loads((folder / "mlflow_run.json").read_text())["run_id"]
    return str(MlflowClient(f"sqlite:///{lmtrain.folder}/mlflow.db").get_run(run_id).info.status)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ launchers


@pytest.mark.slow
@pytest.mark.multiprocess
def test_runs_side_by_side_equal_runs_one_after_the_other(lmtrain: CommandLine, words: list[str]) -> None:
    points = ["trainer.max_steps=20", "lr=1e-3,1e-2"]
    lmtrain(*words, *points, "sweep.name=alone")
    lmtrain(*words, *points, "sweep.name=beside", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    alone, beside = (rows_of(lmtrain.folder / "multirun" / name) for name in ("alone", "beside"))
    assert [(row["run"], row["val/loss"]) for row in beside] == [(row["run"], row["val/loss"]) for row in alone]
