"""What a person sees of a grid in MLflow's own pages, in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from command_line import TINY, CommandLine
from mlflow_server import MlflowServer

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
def test_the_page_that_compares_runs_names_them_and_what_was_swept(
    lmtrain: CommandLine, corpus: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    words = [word for word in TINY if word != "tracking=none"]
    server = MlflowServer(tmp_path / "server")
    server.start()
    try:
        budget = ("trainer.max_steps=4", "lr=2e-3,3e-2", "sweep.name=rates", f"tracking.uri={server.uri}")
        lmtrain("--multirun", *words, f"data.path={corpus}", *budget)
        (experiment,) = MlflowClient(server.uri).search_experiments(filter_string="name = 'lmtrain'")
        runs = MlflowClient(server.uri).search_runs([experiment.experiment_id], "params.lr != ''")
        ids = ",".join(f"%22{run.info.run_id}%22" for run in runs)
        page = f"{server.uri}/#/compare-runs?runs=[{ids}]&experiments=[%22{experiment.experiment_id}%22]"
        options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}")
        command = [str(BROWSER), *options, "--virtual-time-budget=30000", "--dump-dom", page]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    finally:
        server.kill()
    assert all(text in shown for text in ("0000 rates", "0001 rates", ">0.002<", ">0.03<")), shown
