"""The runs of one sweep folder side by side: a table, a CSV file and pictures.

Reads run folders only, so it works for any sweeper and launcher, and again later.
"""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lmtrain.config.schema import TrackingConfig
from lmtrain.inference.serving import save_mlflow_model
from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import read_metrics
from lmtrain.tracking.mlflow.mirror import finish_sweep
from lmtrain.tracking.plots import plot_comparison, plot_objective
from lmtrain.tracking.run_info import SweepEnding

log = logging.getLogger(__name__)

WIDTH_OF_A_LOG = 120
"""Columns of a table that goes to a file."""

NO_SETTINGS_OF_A_RUN = ("resume", "force", "sweep")
"""Words that may differ between calls that made the runs of one sweep."""

MEASURED = ("val/loss", "val/perplexity", "val/bits_per_byte")


@dataclass(frozen=True)
class RunRow:
    """One run of a comparison."""

    folder: RunDir
    settings: dict[str, str]  # key=value words that made this run, by key
    result: dict[str, Any]

    @property
    def objective(self) -> float:
        """Lower is better; infinity if the run has none."""
        value = self.result["objective"]
        return math.inf if value is None else float(value)


@dataclass(frozen=True)
class Comparison:
    """Runs sorted by objective, best first."""

    rows: list[RunRow]

    @property
    def swept(self) -> list[str]:
        """The settings that differ between the runs, in the order they were given."""
        keys = dict.fromkeys(key for row in self.rows for key in row.settings)
        return [key for key in keys if len({row.settings.get(key) for row in self.rows}) > 1]

    @property
    def changed_texts(self) -> list[str]:
        """The names of texts that are not the same in all runs."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            for name, fingerprint in row.result.get("texts", {}).items():
                found.setdefault(name, set()).add(fingerprint)
        return [name for name, fingerprints in found.items() if len(fingerprints) > 1]


def compare(sweep_dir: Path) -> Comparison:
    """Every run of a sweep folder that has ended."""
    rows = []
    for config in sorted(sweep_dir.glob("*/config.yaml")):
        folder = RunDir(config.parent)
        result = folder.read_result()
        if result is not None:
            rows.append(RunRow(folder, _settings(result["overrides"]), result))
    return Comparison(sorted(rows, key=lambda row: (row.objective, row.folder.path.name)))


def _settings(words: Iterable[str]) -> dict[str, str]:
    pairs = (word.lstrip("+~").split("=", 1) for word in words)
    return {key: value for key, value in pairs if key.split(".")[0] not in NO_SETTINGS_OF_A_RUN}


def sum_up(sweep_dir: Path, objective_name: str, tracking: TrackingConfig, *, stopped: bool) -> str:
    """Print the comparison of a sweep folder's runs, write it there and end their parent run.

    Args:
        stopped: whether somebody has put an end to it before all runs were made.

    Returns:
        How the sweep has ended, as the status of a run.
    """
    comparison = compare(sweep_dir)
    statuses = {row.result["status"] for row in comparison.rows}
    status = "failed" if statuses == {"failed"} else "completed"
    if stopped or "interrupted" in statuses:
        status = "interrupted"
    files: list[Path] = []
    metrics: dict[str, float] = {}
    if comparison.rows:
        print_table(comparison, objective_name)
        for name in comparison.changed_texts:
            log.warning("%s changed while these runs were made: they do not compare", name)
        files = write_files(comparison, sweep_dir, objective_name)
        log.info("sweep folder %s: comparison.csv and plots/", sweep_dir)
        if math.isfinite(lowest := comparison.rows[0].objective):
            metrics[f"best {objective_name}"] = lowest
    if comparison.rows:
        best = comparison.rows[0].folder.path if metrics else None
        ending = SweepEnding(status=status, time=time.time(), metrics=metrics, files=files, best=best)
        finish_sweep(tracking, sweep_dir, ending, save_mlflow_model)
    if sweep_dir.is_dir() and not any(sweep_dir.glob("*/config.yaml")):
        (sweep_dir / "multirun.yaml").unlink(missing_ok=True)  # Hydra wrote it before any run was refused
        RunDir(sweep_dir).discard_if_unused()
    return status


def print_table(comparison: Comparison, objective_name: str) -> None:
    """Print the table for people: numbers are rounded, `comparison.csv` has them whole."""
    count = len(comparison.rows)
    title = f"{count} run{'s' if count > 1 else ''} by {objective_name}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("run", *comparison.swept):
        table.add_column(heading, overflow="fold")
    for heading in (objective_name, "bits/byte", "step", "seconds", "status"):
        table.add_column(heading, justify="left" if heading == "status" else "right", overflow="fold")
    for number, row in enumerate(comparison.rows):
        metrics = row.result["metrics"]
        table.add_row(
            row.folder.path.name,
            *(_short(row.settings.get(key, "")) for key in comparison.swept),
            _number(row.result["objective"], 4),
            _number(metrics.get("val/bits_per_byte"), 4),
            str(row.result["step"]),
            _number(row.result["seconds"], 1),
            row.result["status"],
            style="bold" if number == 0 else None,
        )
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_LOG
    console.print(table)


def write_files(comparison: Comparison, sweep_dir: Path, objective_name: str) -> list[Path]:
    """Write `comparison.csv` and the pictures under `plots/`; returns their paths."""
    table = sweep_dir / "comparison.csv"
    swept = comparison.swept
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *swept, "objective", *MEASURED, "best_step", "step", "tokens", "seconds", "status"])
        for row in comparison.rows:
            result = row.result
            measured = (result["metrics"].get(name) for name in MEASURED)
            counts = (result[name] for name in ("best_step", "step", "tokens", "seconds", "status"))
            settings = (row.settings.get(key) for key in swept)
            writer.writerow([row.folder.path.name, *settings, result["objective"], *measured, *counts])
    return [table, *_pictures(comparison, sweep_dir / "plots", objective_name)]


def _pictures(comparison: Comparison, folder: Path, objective_name: str) -> Iterable[Path]:
    curves = [
        (_label(row, comparison.swept), read_metrics(row.folder.metrics))
        for row in comparison.rows
        if row.folder.metrics.exists()
    ]
    if not curves:
        return []
    folder.mkdir(exist_ok=True)
    points = [
        ({key: _value(row.settings[key]) for key in comparison.swept if key in row.settings}, row.objective)
        for row in comparison.rows
    ]
    drawn = (
        plot_comparison(curves, folder / "comparison.png"),
        plot_objective(points, objective_name, folder / "objective.png"),
    )
    return [path for path in drawn if path is not None]


def _label(row: RunRow, swept: list[str]) -> str:
    return " ".join(f"{key}={row.settings[key]}" for key in swept if key in row.settings) or row.folder.path.name


def _short(word: str) -> str:
    """A word of the command line for people: numbers to four digits."""
    value = _value(word)
    return word if isinstance(value, str) else f"{value:.4g}"


def _value(word: str) -> float | str:
    """A word of the command line as a number, if it is one."""
    try:
        return float(word)
    except ValueError:
        return word


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
