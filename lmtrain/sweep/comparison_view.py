"""A comparison of runs in words: tables for people, CSV and JSON for programs, each from the same cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from lmtrain.sweep.comparison import BITS, Comparison, Row, doubts
from lmtrain.sweep.repetition import ONE_SEED, Repetition, Setting, repetition_of
from lmtrain.sweep.statistics import Interval, Judgement
from lmtrain.sweep.terminal import new_table, output
from lmtrain.sweep.wording import short_count, short_names, short_score, short_value

MEASURED = ("val/loss", "val/perplexity", BITS)

NUMBERS = ("bits/byte", "perplexity", "step", "tokens", "seconds")
"""Headings of what a run reached, after the metric compared by."""

_LONGEST_NAME = 28  # of a run, that is not folded
_ROOM_FOR_SETTINGS = 20  # columns of a terminal that settings have at least
_ROOM_FOR_NUMBERS = 76  # those of all that follows the settings
_GAP = 3  # between two columns of a table
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
    """Numbers are rounded here; `comparison.csv` has them whole."""
    count = len(comparison.rows)
    table = new_table(f"{count} run{'s' if count > 1 else ''} by {comparison.metric}")
    names = short_names(comparison.keys)
    settings = {row.name: _cells(comparison, row, names) for row in comparison.rows}
    name_width = min(max(len(row.name) for row in comparison.rows), _LONGEST_NAME)
    table.add_column("run", overflow="fold", min_width=name_width)
    longest = [max(map(len, column)) for column in zip(names.values(), *settings.values(), strict=True)]
    room = max(_ROOM_FOR_SETTINGS, width - _ROOM_FOR_NUMBERS - name_width - _GAP)
    if names and sum(longest) + _GAP * len(longest) <= room:
        for heading in names.values():
            table.add_column(heading, overflow="fold")
    elif names:
        table.add_column("settings", overflow="fold", min_width=_ROOM_FOR_SETTINGS)
        settings = {row: [_in_a_line(names, cells)] for row, cells in settings.items()}
    for heading in (comparison.metric, *NUMBERS, "status"):
        table.add_column(heading, justify="left" if heading == "status" else "right", overflow="fold")
    for row in comparison.rows:
        cells = (row.name, *settings[row.name], *numbers(comparison, row), row.status.replace("_", " "))
        table.add_row(*map(Text, cells), style="bold" if row is comparison.best else None)
    return table


def _in_a_line(names: Mapping[str, str], cells: Sequence[str]) -> str:
    pairs = [f"{name} {cell}" for name, cell in zip(names.values(), cells, strict=True) if cell]
    more = [f"and {len(pairs) - _MAX_NAMED} more"] if len(pairs) > _MAX_NAMED else []
    return ", ".join([*pairs[:_MAX_NAMED], *more])


def _settings_table(repetition: Repetition) -> Table:
    table = new_table(f"{len(repetition.settings)} settings over their seeds: {repetition.metric}, 95 % intervals")
    table.add_column("settings", overflow="fold")
    for heading in ("seeds", "mean", "interval", "above the best", "p (Holm)"):
        table.add_column(heading, justify="right")
    table.add_column("")
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


def _cells(comparison: Comparison, row: Row, keys: Iterable[str]) -> list[str]:
    settings = comparison.settings[row.name]
    return [short_value(settings[key]) if key in settings else "" for key in keys]


def _span(interval: Interval | None, format: str) -> str:
    return "" if interval is None else f"{interval.low:{format}} … {interval.high:{format}}"
