"""The files of a comparison of runs: a page that needs nothing beside itself, a table with every digit, pictures."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmtrain.errors import RunFolderError
from lmtrain.run_dir import STUDY_FILE, write_atomically
from lmtrain.sweep.comparison import COMPLETED, Comparison, Row, higher_is_better
from lmtrain.sweep.comparison_view import NUMBERS, numbers, remarks, setting_cells, to_csv
from lmtrain.sweep.page import data_uri, fill_page
from lmtrain.sweep.repetition import repetition_of
from lmtrain.sweep.wording import short_names, short_score, short_value
from lmtrain.tracking.comparison_plots import plot_comparison, plot_objective

PAGE, TABLE = "report.html", "comparison.csv"

_PICTURES = {
    "comparison.png": ("Curves", "Every run over the tokens it saw; the best by name."),
    "objective.png": ("Settings", "Each run at each setting in which runs differ; the star is the best."),
}
_KINDS = {"early_stopped": "completed", "out_of_memory": "infeasible", "interrupted": "waiting", "died": "failed"}


def require_room(folder: Path) -> None:
    """Raise RunFolderError unless a comparison may be written there: into a new folder, or over an earlier one."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: name a new folder")
    if folder.is_dir() and any(folder.iterdir()) and (not (folder / TABLE).is_file() or (folder / STUDY_FILE).exists()):
        raise RunFolderError(f"{folder} holds something else than a comparison: name a new folder")


def write_comparison(comparison: Comparison, folder: Path, title: str) -> list[Path]:
    """Write page, table and `plots/` into a folder, which is made; returns the files, the page first.

    Raises RunFolderError if they cannot be written.
    """
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        pictures = _draw(comparison, folder / "plots")
        write_atomically(folder / TABLE, to_csv(comparison))
        write_atomically(folder / PAGE, _page(comparison, pictures, title))
    except OSError as error:
        raise RunFolderError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return [folder / PAGE, folder / TABLE, *pictures]


def _draw(comparison: Comparison, folder: Path) -> list[Path]:
    curves = [(_label(comparison, row), row.run.records) for row in comparison.rows if row.run.records]
    keys = [key for key in comparison.keys if key != "seed"] or comparison.keys
    points = [
        ({key: value for key, value in comparison.settings[row.name].items() if key in keys}, comparison.value(row))
        for row in comparison.rows
        if row.came_to_its_end
    ]
    known = [(settings, math.nan if value is None else value) for settings, value in points]
    highest = higher_is_better(comparison.metric)
    drawn = (
        plot_comparison(curves, folder / "comparison.png"),
        plot_objective(known, comparison.metric, folder / "objective.png", highest=highest),
    )
    for name, path in zip(_PICTURES, drawn, strict=True):
        if path is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier comparison
    return [path for path in drawn if path is not None]


def _page(comparison: Comparison, pictures: Sequence[Path], title: str) -> str:
    repetition = repetition_of(comparison)
    names = short_names(comparison.keys)
    return fill_page(
        "comparison.html.j2",
        title=title,
        summary=_summary(comparison),
        metric=comparison.metric,
        best=_best(comparison),
        remarks=remarks(comparison, repetition),
        settings=[] if repetition is None else list(map(setting_cells, repetition.settings, repetition.judgements)),
        pictures=[
            ({"title": _PICTURES[path.name][0], "caption": _PICTURES[path.name][1]}, data_uri(path))
            for path in pictures
        ],
        headings=["run", "status", *names.values(), comparison.metric, *NUMBERS],
        rows=[_row(comparison, row) for row in comparison.rows],
        shared=comparison.shared,
    )


def _summary(comparison: Comparison) -> str:
    """`12 runs: 10 completed, 1 died, 1 running`."""
    kinds = [row.status.replace("_", " ") for row in comparison.rows]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{len(kinds)} run{'' if len(kinds) == 1 else 's'} by {comparison.metric}: {counted}"


def _best(comparison: Comparison) -> dict[str, Any] | None:
    best = comparison.best
    if best is None:
        return None
    value = comparison.value(best)
    settings = comparison.settings[best.name]
    return {
        "name": best.name,
        "value": "" if value is None else short_score(value),
        "settings": {key: short_value(value) for key, value in settings.items()},
        "command": f"python -m lmtrain --config-dir {shlex.quote(str(best.run.folder))} --config-name config",
    }


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    """A row of the page's table: of each cell what is shown, and what it is sorted by."""
    settings = comparison.settings[row.name]
    shown = numbers(comparison, row)
    exact = [
        *(comparison.value(row), row.last_value("val/bits_per_byte"), row.last_value("val/perplexity")),
        *(row.result.get(name) for name in ("step", "tokens", "seconds")),
    ]
    return {
        "kind": "completed" if row.status in COMPLETED else _KINDS.get(row.status, row.status),
        "is_best": row is comparison.best,
        "cells": [
            (row.name, row.name),
            (row.status.replace("_", " "), row.status),
            *(
                (short_value(settings[key]), settings[key]) if key in settings else ("", None)
                for key in comparison.keys
            ),
            *zip(shown, exact, strict=True),
        ],
    }


def _label(comparison: Comparison, row: Row) -> str:
    """What tells a run from the others in a legend."""
    settings = comparison.settings[row.name]
    names = short_names(list(settings))
    words = " ".join(f"{names[key]}={short_value(value)}" for key, value in settings.items())
    return words if words and len(words) <= 60 else row.name
