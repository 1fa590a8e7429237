"""A trial as an experiment of its own, and the reports of a real study, on disk and in MLflow."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import TINY, CommandLine, snapshot
from studies import begun, end

from lmtrain.errors import ConfigError, RunFolderError
from lmtrain.sweep.export import command_for, export_best
from lmtrain.sweep.reading import read_study

STUDY = (
    *("--multirun", "--config-dir", "mine", "model=flat", "sweep=lr_dropout_batch", "sweep.name=found/best"),
    *(
        "optimizer=choice(adamw,muon)",
        "batch_size=choice(2,4)",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.sampler.seed=1",
    ),
    *("trainer.max_tokens=1920", "trainer.eval_every_tokens=640", "hydra/sweeper/pruner=median"),
    *("hydra.sweeper.pruner.n_startup_trials=1", "hydra.sweeper.pruner.n_min_trials=1", "optimizer.betas=[0.8,0.9]"),
    "sweep.enqueue=[{lr:0.001,dropout:0.2,batch_size:4,optimizer:muon}]",  # slower than the defaults, so pruned
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> CommandLine:
    """A folder in which a study was made, with a model from the user's own options, mirrored to MLflow."""
    lmtrain = CommandLine(tmp_path_factory.mktemp("export"))
    (lmtrain.folder / "mine/model").mkdir(parents=True)
    (lmtrain.folder / "mine/model/flat.yaml").write_text(
        "defaults: [_decoder, _self_]\nd_model: 16\nnum_layers: 1\nnum_heads: 2\nd_ff: 24\n"
    )
    words = [word for word in TINY if not word.startswith(("model.", "batch_size=", "tracking="))]
    lmtrain(*words, f"data.path={corpus}", *STUDY)
    return lmtrain


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def test_an_exported_trial_trains_again_to_the_same_number(made: CommandLine) -> None:
    study = made.folder / "multirun/found/best"
    told = made("sweep", "export", "multirun/found/best", "again", "--to", "kept/experiment").stdout.splitlines()
    path = made.folder / "kept/experiment/again.yaml"
    assert told == [
        "kept/experiment/again.yaml",
        "train it with: python -m lmtrain --config-dir kept experiment=again",
    ]
    best = yaml.safe_load((study / "best.yaml").read_text())
    trial = study / best["folder"]
    made(*told[1].split("python -m lmtrain ")[1].split(), "hydra.run.dir=again", "tracking=none")
    first, second = result_of(trial), result_of(made.folder / "again")
    assert second["objective"] == first["objective"] == best["values"]["val/loss"]
    assert second["metrics"]["val/loss"] == first["metrics"]["val/loss"]
    saved, repeated = (
        yaml.safe_load((folder / "config.yaml").read_text()) for folder in (trial, made.folder / "again")
    )
    assert {key for key in saved if saved[key] != repeated[key]} <= {"tracking", "defaults"}
    assert saved["defaults"][:-2] == repeated["defaults"][:-2], "all but the tracker"
    content = yaml.safe_load(path.read_text())
    assert {"override /model": "_decoder"} in content["defaults"], "options of one's own are written out"
    assert {"override /optimizer": best["params"]["optimizer"]} in content["defaults"]
    assert content["optimizer"] == {"betas": [0.8, 0.9]}, "only what the option does not bring"
    assert content["lr"] == best["params"]["lr"]
    header = path.read_text().split("defaults:")[0]
    assert header.startswith("# @package _global_\n# Trial ")
    assert f"of the study found/best, {date.today()}" in header


def test_an_experiment_is_not_overwritten_unasked(made: CommandLine) -> None:
    words = ("sweep", "export", "multirun/found/best", "kept", "--to", "other/experiment")
    made(*words)
    before = snapshot(made.folder / "other")
    refused = made(*words, "--trial", "0", status=2)
    assert "is there already: give another name, or replace it with --force" in refused.stderr
    assert snapshot(made.folder / "other") == before
    made(*words, "--force")


def test_mlflow_has_the_study_as_the_folder_has_it(made: CommandLine) -> None:
    from mlflow import MlflowClient

    folder = made.folder / "multirun/found/best"
    client = MlflowClient(f"sqlite:///{made.folder / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "lmtrain")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("found/best")
    assert parent.info.status == "FINISHED"
    study = read_study(folder)
    assert study.best is not None
    assert parent.data.metrics["summary/best val/loss"] == study.best.values[0]
    assert parent.data.metrics["summary/trials completed"] == study.counts["completed"]
    artifacts = {path.path for path in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "trials.csv", "best.yaml", "optimization_results.yaml", "plots"} <= artifacts
    assert len(client.list_artifacts(parent.info.run_id, "plots")) == len(list((folder / "plots").glob("*.png")))
    told = {
        (int(run.data.tags["trial"]), run.data.tags["status"], run.data.tags["mlflow.parentRunId"])
        for run in runs.values()
    }
    statuses = [trial.user_attrs["outcome"]["status"] for trial in study.trials]
    assert {"completed", "pruned"} <= set(statuses)
    assert told == {(number, status, parent.info.run_id) for number, status in enumerate(statuses)}
    assert all(run.info.status == "FINISHED" for run in runs.values())


def test_the_report_can_be_written_again(made: CommandLine) -> None:
    folder = made.folder / "multirun/found/best"
    before = {path.name: path.read_bytes() for path in folder.glob("*.yaml")}
    for path in ("report.html", "trials.csv"):
        (folder / path).unlink()
    printed = made("sweep", "report", "multirun/found/best").stdout.splitlines()
    assert "multirun/found/best/report.html" in printed
    assert all((made.folder / path).is_file() for path in printed)
    assert {path.name: path.read_bytes() for path in folder.glob("*.yaml")} == before


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"trial": 1}, "trial 1 is pruned: only a completed trial has a result"),
        ({"trial": 7}, "trial 7 is waiting"),
        ({"trial": 99}, "has no trial 99; there are 10, counted from 0"),
        ({"trial": -1}, "has no trial -1"),
        ({"name": "a/b"}, "made of letters, digits, - and _, got 'a/b'"),
        ({"name": "1e3"}, "got '1e3'"),
        ({"to": "elsewhere"}, "in a folder named experiment, such as elsewhere/experiment"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, arguments: dict[str, Any], rule: str) -> None:
    study = begun(tmp_path)
    end(study, "completed", 3.0)
    end(study, "pruned", 4.0)
    given = {"to": tmp_path / "experiment"} | arguments
    given["to"] = Path(given["to"])
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=rule.replace("(", r"\(")):
        export_best(read_study(tmp_path), **given)
    assert snapshot(tmp_path) == before


def test_a_trial_of_another_machine_is_exported_there(tmp_path: Path) -> None:
    end(begun(tmp_path), "completed", 3.0)
    with pytest.raises(RunFolderError, match="export it where it was trained"):
        export_best(read_study(tmp_path), to=tmp_path / "experiment")
    assert not (tmp_path / "experiment").exists()


def test_a_study_without_a_result_has_nothing_to_export(tmp_path: Path) -> None:
    end(begun(tmp_path), "pruned", 3.0)
    with pytest.raises(RunFolderError, match="no trial of the study was completed"):
        export_best(read_study(tmp_path), to=tmp_path / "experiment")


def test_one_of_a_front_has_to_be_chosen(tmp_path: Path) -> None:
    study = begun(tmp_path, objectives=("val/loss", "run/parameters"), directions=("minimize", "minimize"))
    end(study, "completed", 3.0, 1000)
    end(study, "completed", 4.0, 500)
    with pytest.raises(ConfigError, match=r"choose one with --trial \(0, 1\)"):
        export_best(read_study(tmp_path), to=tmp_path / "experiment")


def test_the_command_fits_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmtrain.config.compose import config_dir

    monkeypatch.chdir(tmp_path)
    assert command_for(config_dir() / "experiment/found.yaml") == "python -m lmtrain experiment=found"
    assert command_for(Path("experiment/found.yaml")) == "python -m lmtrain --config-dir . experiment=found"
    assert command_for(Path("my own/experiment/a.yaml")) == "python -m lmtrain --config-dir 'my own' experiment=a"
