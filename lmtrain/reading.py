"""A run as its folder records it, for everybody who reads runs rather than makes them.

Opens what is there, whether the run goes on, has ended or died, and changes nothing. What runs have in common, and how
they differ, is in `sweep/comparison.py`; the model of a run is opened in `inference/`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lmtrain.config.saved import flat_settings, load_yaml
from lmtrain.errors import RunFolderError
from lmtrain.run_dir import CONFIG_FILE, RunDir
from lmtrain.tracking.metrics_file import read_metrics
from lmtrain.tracking.run_info import DIED

if TYPE_CHECKING:
    from pandas import DataFrame

RUNNING = "running"
"""What a run is whose folder some process has."""

_PLACE = ("step", "tokens", "time", "attempt")  # of every record: where it stands, rather than what was measured


@dataclass(frozen=True, kw_only=True, repr=False)
class RecordedRun:
    """One run, as it was when it was read; its records are read when they are first asked for."""

    folder: RunDir
    config: dict[str, Any]  # what config.yaml holds, nested as it is there
    result: dict[str, Any] | None  # what result.json holds; None while the run has not ended
    status: str  # that of the result; of a run without one RUNNING or DIED

    def __repr__(self) -> str:
        return f"<run {self.folder}: {self.status}>"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config by dotted key (`trainer.max_steps`); a group's name stands for the schema chosen in it."""
        return flat_settings(self.config)

    @cached_property
    def records(self) -> list[dict[str, float]]:
        """Every record of its metrics file, in order; none if it died before the first.

        A torn last line is left out with a warning. Raises RunFolderError for a line that is no record.
        """
        return read_metrics(self.folder.metrics) if self.folder.metrics.exists() else []

    @cached_property
    def metrics(self) -> DataFrame:
        """The records as a table, a row each: step, tokens, time (seconds since the epoch), attempt, then each metric.

        NaN where a record has no such metric.
        """
        import pandas

        names = dict.fromkeys([*_PLACE, *(name for record in self.records for name in record)])
        return pandas.DataFrame(self.records, columns=list(names))


def find_runs(folder: Path) -> list[Path]:
    """The run folders at or below a folder, sorted. Raises RunFolderError if there are none."""
    found = []
    for parent, folders, files in os.walk(folder):
        if CONFIG_FILE in files:
            found.append(Path(parent))
            folders.clear()  # a run holds no other
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    if not found:
        raise RunFolderError(f"there is no run folder at or below {RunDir(folder)} (it would hold {CONFIG_FILE})")
    return found


def read_run(path: Path | str) -> RecordedRun:
    """The run of a folder.

    Raises RunFolderError if there is no such folder, no run in it, or a file of it cannot be read.
    """
    folder = RunDir(Path(path))
    if not folder.path.is_dir():
        raise RunFolderError(
            f"{folder} is a file; name the folder of a run" if folder.path.exists() else f"there is no folder {folder}"
        )
    if not folder.is_run():
        raise RunFolderError(f"{folder} is not a run folder: it has no {folder.config.name}")
    try:
        config = load_yaml(folder.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{folder.config} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{folder.config} is damaged: it holds no settings")
    running = folder.in_use()  # asked first: a run that ends now has a result by the time that is looked for
    result = folder.read_result()
    status = (RUNNING if running else DIED) if result is None else str(result["status"])
    return RecordedRun(folder=folder, config=config, result=result, status=status)
