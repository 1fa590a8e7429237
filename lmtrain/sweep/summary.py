"""The end of a multirun that is no study: its runs compared, and its parent run in the tracker told."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import RunFolderError
from lmtrain.inference.serving import save_mlflow_model
from lmtrain.run_dir import RunDir
from lmtrain.sweep.comparison import Comparison, compare, find_runs
from lmtrain.sweep.comparison_report import write_comparison
from lmtrain.sweep.comparison_view import print_comparison
from lmtrain.tracking.mlflow.mirror import finish_sweep
from lmtrain.tracking.run_info import SweepEnding

log = logging.getLogger(__name__)


def sum_up(sweep_dir: Path, objective_name: str, tracking: TrackingConfig, *, stopped: bool) -> str:
    """Print the comparison of a sweep folder's runs, write it there and end their parent run.

    Args:
        stopped: whether somebody has put an end to it before all runs were made.

    Returns:
        How the sweep has ended, as the status of a run.
    """
    comparison = _comparison(sweep_dir)
    ended = {row.run.status for row in comparison.rows if row.run.result is not None}
    status = "failed" if ended == {"failed"} else "completed"
    if stopped or "interrupted" in ended:
        status = "interrupted"
    files: list[Path] = []
    metrics: dict[str, float] = {}
    if comparison.rows:
        print_comparison(comparison)
        files = write_comparison(comparison, sweep_dir, sweep_dir.name)
        log.info("sweep folder %s: report.html, comparison.csv and plots/", sweep_dir)
        if comparison.best is not None and (best := comparison.value(comparison.best)) is not None:
            metrics[f"best {objective_name}"] = best
        winner = comparison.best.run.folder.path if comparison.best is not None and metrics else None
        ending = SweepEnding(status=status, time=time.time(), metrics=metrics, files=files, best=winner)
        finish_sweep(tracking, sweep_dir, ending, save_mlflow_model)
    if sweep_dir.is_dir() and not any(sweep_dir.glob("*/config.yaml")):
        (sweep_dir / "multirun.yaml").unlink(missing_ok=True)  # Hydra wrote it before any run was refused
        RunDir(sweep_dir).discard_if_unused()
    return status


def _comparison(sweep_dir: Path) -> Comparison:
    """Of every run of the folder; empty if there is none, or none that can be read."""
    try:
        return compare(find_runs([sweep_dir]))
    except RunFolderError:
        return compare([])
