"""A comparison of runs in words: tables for people, CSV and JSON for programs, each from the same cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from lmtrain.sweep.comparison import BITS, Comparison, Row, doubts
from lmtrain.sweep.repetition import ONE_SEED, Repetition, Setting, repetition_of
from lmtrain.sweep.statistics import WORSE, Interval, Judgement
from lmtrain.sweep.terminal import new_table, output
from lmtrain.sweep.wording import short_count, short_names, short_score, short_value

MEASURED = ("val/loss", "val/perplexity", BITS)

NUMBERS = ("bits/byte", "perplexity", "step", "tokens", "seconds")
"""Headings of what a run reached, after the metric compared by."""

_DISPENSABLE = ("perplexity", "seconds", "tokens", "step", "bits/byte")  # on a narrow terminal, in this order
_LONGEST_NAME = 28  # of a run, that is not folded
_PADDING = 3  # of a column
_MAX_NAMED = 8  # settings named where there is no room for a column each


def remarks(comparison: Comparison, repetition: Repetition | None) -> list[str]:
    """What to know before believing the table, in sentences."""
    ended = sum(row.came_to_its_end for row in comparison.rows)
    once = [ONE_SEED] if repetition is None and ended > 1 and "seed" not in comparison.keys else []
    return [*doubts(comparison), *([] if repetition is None else repetition.conclusions()), *once]


def print_comparison(comparison: Comparison) -> None:
    """Print the runs, the settings where they were trained with several seeds, and what to know about both."""
    console = output()
    repetition = repetition_of(comparison)
    console.print(_runs_table(comparison, width=console.width))
    if repetition is not None:
        console.print(_settings_table(repetition))
    for sentence in remarks(comparison, repetition):
        console.print(Text(sentence), soft_wrap=True)


def _runs_table(comparison: Comparison, *, width: int) -> Table:
    """Numbers are rounded here; `comparison.csv` has them whole. On a narrow terminal some are left out."""
    rows = comparison.rows
    names = short_names(comparison.keys)
    settings = {name: [_cell(comparison, row, key) for row in rows] for key, name in names.items()}
    reached = zip(*(numbers(comparison, row) for row in rows), strict=True)
    measured = dict(zip((comparison.metric, *NUMBERS), reached, strict=True))
    measured["status"] = tuple(row.status.replace("_", " ") for row in rows)
    runs = {"run": [row.name for row in rows]}
    wanted = min(_width(settings), width // 3)
    for heading in _DISPENSABLE:
        if min(_width(runs), _LONGEST_NAME) + wanted + _width(measured) > width:
            measured.pop(heading, None)
    if _width(runs) + _width(settings) + _width(measured) > width and settings:
        settings = {"settings": [_in_a_line(names, cells) for cells in zip(*settings.values(), strict=True)]}
    table = new_table(f"{len(rows)} run{'' if len(rows) == 1 else 's'} by {comparison.metric}")
    for heading, cells in (runs | settings).items():
        least = min(_width({heading: cells}) - _PADDING, _LONGEST_NAME if heading == "run" else wanted)
        table.add_column(heading, overflow="fold", min_width=least)
    for heading in measured:
        table.add_column(heading, justify="left" if heading == "status" else "right", no_wrap=True)
    columns = [*runs.values(), *settings.values(), *measured.values()]
    for row, line in zip(rows, zip(*columns, strict=True), strict=True):
        table.add_row(*map(Text, line), style="bold" if row is comparison.best else None)
    return table


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """Of a table with these columns."""
    return sum(max(map(len, (heading, *cells))) + _PADDING for heading, cells in columns.items())


def _in_a_line(names: Mapping[str, str], cells: Sequence[str]) -> str:
    pairs = [f"{name} {cell}" for name, cell in zip(names.values(), cells, strict=True) if cell]
    more = [f"and {len(pairs) - _MAX_NAMED} more"] if len(pairs) > _MAX_NAMED else []
    return ", ".join([*pairs[:_MAX_NAMED], *more])


def _settings_table(repetition: Repetition) -> Table:
    table = new_table(f"{len(repetition.settings)} settings over their seeds: {repetition.metric}, 95 % intervals")
    table.add_column("settings", overflow="fold")
    for heading in ("seeds", "mean", "interval", "above the best", "p (Holm)"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("", overflow="fold", min_width=len(WORSE))
    for place, (setting, judgement) in enumerate(zip(repetition.settings, repetition.judgements, strict=True)):
        table.add_row(*map(Text, setting_cells(setting, judgement)), style=None if place else "bold")
    return table


def setting_cells(setting: Setting, judgement: Judgement) -> list[str]:
    """A row for people: settings, seeds, mean, interval, difference to the best, p, verdict."""
    return [
        setting.label,
        " ".join(map(str, sorted(setting.values))),
        short_score(setting.mean) if setting.values else "",
        _span(setting.interval, ".4f"),
        _span(judgement.difference, "+.4f"),
        "" if judgement.p_value is None else f"{judgement.p_value:.2g}{'' if judgement.paired else ' (unpaired)'}",
        judgement.verdict,
    ]


def numbers(comparison: Comparison, row: Row) -> list[str]:
    """What a run reached, for people: the metric compared by, bits per byte, perplexity, step, tokens, seconds."""
    bits, perplexity = row.last_value(BITS), row.last_value("val/perplexity")
    step, tokens, seconds = (row.result.get(name) for name in ("step", "tokens", "seconds"))
    return [
        *("" if value is None else short_score(value) for value in (comparison.value(row), bits)),
        "" if perplexity is None else f"{perplexity:.2f}",
        "" if step is None else f"{step:.0f}",
        "" if tokens is None else short_count(int(tokens)),
        "" if seconds is None else f"{seconds:,.1f}",
    ]


def to_csv(comparison: Comparison) -> str:
    """Every number whole, a line for each run; empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    counts = ("best_step", "step", "tokens", "seconds")
    extra = [] if comparison.metric in (*MEASURED, "objective") or comparison.is_objective else [comparison.metric]
    writer.writerow(["run", *comparison.keys, "objective", *MEASURED, *extra, *counts, "status"])
    for row in comparison.rows:
        settings = comparison.settings[row.name]
        writer.writerow(
            [
                row.name,
                *(settings.get(key) for key in comparison.keys),
                row.best_value(row.objective),
                *(row.last_value(name) for name in (*MEASURED, *extra)),
                *(row.result.get(name) for name in counts),
                row.status,
            ]
        )
    return text.getvalue()


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The same and what follows from it, for programs; None where there is no number."""
    repetition = repetition_of(comparison)
    runs = [
        {
            "run": row.name,
            "folder": str(row.run.folder.path),
            "status": row.status,
            "settings": comparison.settings[row.name],
            "value": comparison.value(row),
            "objective": row.best_value(row.objective),
            "objective_name": row.objective,
            "metrics": {name: row.last_value(name) for name in row.result["metrics"]},
            **{name: row.result.get(name) for name in ("best_step", "step", "tokens", "seconds")},
        }
        for row in comparison.rows
    ]
    settings = [] if repetition is None else map(_setting_in_json, repetition.settings, repetition.judgements)
    return {
        "metric": comparison.metric,
        "runs": runs,
        "settings": list(settings),
        "remarks": remarks(comparison, repetition),
    }


def _setting_in_json(setting: Setting, judgement: Judgement) -> dict[str, Any]:
    return {
        "settings": setting.settings,
        "runs": setting.runs,
        "values": setting.values,
        "mishaps": setting.mishaps,
        "mean": setting.mean if math.isfinite(setting.mean) else None,
        "interval": None if setting.interval is None else asdict(setting.interval),
        **asdict(judgement),
    }


def _cell(comparison: Comparison, row: Row, key: str) -> str:
    settings = comparison.settings[row.name]
    return short_value(settings[key]) if key in settings else ""


def _span(interval: Interval | None, format: str) -> str:
    return "" if interval is None else f"{interval.low:{format}} … {interval.high:{format}}"
