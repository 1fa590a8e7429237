"""Runs as a tracker sees them: told of, recorded in their folder, ended; nothing is trained."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lmtrain.config.schema import TrackingConfig
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import MetricsFile
from lmtrain.tracking.run_info import RunInfo
from lmtrain.tracking.tracker import build_tracker


def run_info(folder: Path, **fields: Any) -> RunInfo:
    """What is told of the run of a folder; its id is made of the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    RunDir(folder).config.touch()
    plain: dict[str, Any] = {
        "id": f"{folder.parent.name}-{folder.name}",
        "name": folder.name,
        "folder": folder,
        "started": 1000.0,
    }
    return RunInfo(**plain | {"params": {}, "tags": {}, "origin": {"host": platform.node()}} | fields)


def record(step: int, **metrics: float) -> dict[str, float]:
    """One of training, a second after that of the step before."""
    place = {"step": step, "tokens": step * 8, "time": 1000.0 + step, "attempt": 0}
    return {**place, "train/loss": 1 / step, **metrics}


def end(folder: Path, status: str, **fields: Any) -> None:
    """Note in a run folder how the run ended."""
    RunDir(folder).write_result({"status": status, "objective": None, "best_step": None, "ended": 2000.0} | fields)


def attempt(
    config: TrackingConfig,
    folder: Path,
    records: Iterable[Mapping[str, float]],
    *,
    status: str = "completed",
    **fields: Any,
) -> None:
    """A run of some records: the metrics file first, then the mirror, as the trainer does."""
    tracker = build_tracker(config)
    info = run_info(folder, **fields)
    metrics_file = MetricsFile(RunDir(folder).metrics)
    tracker.start(info)
    for one in records:
        metrics_file.append(one)
        tracker.log(one)
    metrics_file.close()
    end(folder, status)
    tracker.finish()
