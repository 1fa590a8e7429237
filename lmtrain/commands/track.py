"""`lmtrain track`: mirrors of runs, made or put right from run folders.

  lmtrain track sync DIR… [--uri URI] [--experiment NAME] [--no-models]   MLflow as the folders say

DIR is a run folder, a sweep folder, or any folder with some below it. Doing it again changes nothing.
"""

from __future__ import annotations

from pathlib import Path

from lmtrain.commands import CommandParser, run_verb
from lmtrain.run_dir import RunDir


def main(arguments: list[str]) -> int:
    """Run `sync`; exit status 0. Raises LmtrainError for what cannot be done."""
    return run_verb("track", __doc__, {"sync": sync}, arguments)


def sync(arguments: list[str]) -> None:
    """Make MLflow what run folders say, and print what became of each."""
    parser = CommandParser("track sync", "Make or repair MLflow from run folders alone; again, it changes nothing.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run folder, or a folder of some")
    parser.add_argument("--uri", help="of MLflow (default: as a run of these settings would find it)")
    parser.add_argument("--experiment", metavar="NAME", help="in MLflow (default: that of each run)")
    parser.add_argument("--no-models", action="store_true", help="leave out the models of the best checkpoints")
    options = parser.parse_args(arguments)
    from lmtrain.reading import find_runs

    runs = list(dict.fromkeys(run for folder in options.folders for run in find_runs(folder)))
    from lmtrain.inference.serving import save_mlflow_model
    from lmtrain.tracking.mlflow.sync import Syncer

    syncer = Syncer(options.uri, options.experiment, None if options.no_models else save_mlflow_model)
    for folder, outcome in syncer.sync(runs):
        print(f"{outcome:10} {RunDir(folder)}", flush=True)
