"""A study in words and tables, for terminals and log files. Pure: from a `ReadStudy` to what is printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from optuna.trial import FrozenTrial
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lmtrain.sweep.reading import KINDS, ReadStudy, kind_of, seconds_of, status_of
from lmtrain.sweep.study import lease_of, outcome_of
from lmtrain.sweep.terminal import new_table
from lmtrain.sweep.wording import short_count, short_names, short_score, short_value

NOBODY = "nobody works on it; the same command goes on"

_PACE_FROM = 0.05
"""Part of a trial that must be done before its pace is worth something: the start takes its time."""
_ROOM_OF_THE_REST = 44
"""Columns of a table that parameters cannot have."""


def summary(study: ReadStudy, *, workers: int | None = None) -> str:
    """One line: `7 of 20 done: 3 completed, 4 pruned · best 3.2140 (trial 4) · about 6 min left`.

    `workers`: how many there are, if not as many as trials run at this moment.
    """
    counts = {kind: study.counts[kind] for kind in KINDS if study.counts[kind]}
    done = [f"{count} {kind}" for kind, count in counts.items() if kind not in ("running", "waiting")]
    parts = [f"{len(study.ended)} of {len(study.trials)} done" + (f": {', '.join(done)}" if done else "")]
    return " · ".join(part for part in (*parts, _best(study), _rest(study, workers)) if part)


def trial_line(study: ReadStudy, trial: FrozenTrial) -> str:
    """How a trial ended: `trial 7 pruned at 102k tokens, val/loss 3.9100 (lr 0.0031, batch_size 8)`."""
    score, reason = study.score_of(trial), outcome_of(trial).get("reason")
    words = f"trial {trial.number} {status_of(trial).replace('_', ' ')}"
    if tokens := study.tokens_of(trial):
        words += f" at {short_count(tokens)} tokens"
    if score is not None:
        words += f", {study.objectives[0]} {short_score(score)}"
    if reason:
        words += f": {reason}"
    return f"{words} ({parameters_in_a_line(study, trial)})" if trial.params else words


def standing(study: ReadStudy, *, workers: int | None = None) -> str:
    """The end of a log line: `best 3.2140 (trial 4) · 8 of 20, about 6 min left`; `workers` as for `summary`."""
    counted = f"{len(study.ended)} of {len(study.trials)}" + (f", {rest}" if (rest := _rest(study, workers)) else "")
    return " · ".join(part for part in (_best(study), counted) if part)


def running_table(study: ReadStudy, *, width: int, max_rows: int | None = None) -> RenderableType:
    """The trials that run now, each with its progress."""
    running = study.running
    shown = running if max_rows is None else running[: max(1, max_rows)]
    budget = "" if study.budget_tokens is None else f" · {short_count(study.budget_tokens)} tokens a trial"
    table = new_table(f"{study.name}{budget}")
    parameters = _Parameters(study, shown, width)
    for heading in ("trial", "worker"):
        table.add_column(heading, justify="right")
    parameters.add_columns(table)
    for heading in ("progress", "tokens", study.objectives[0]):
        table.add_column(heading, justify="left" if heading == "progress" else "right", no_wrap=True)
    hosts = {lease.host for trial in running if (lease := lease_of(trial)) is not None}
    for trial in shown:
        tokens, score = study.tokens_of(trial), study.score_of(trial)
        table.add_row(
            str(trial.number),
            _worker(trial, with_host=len(hosts) > 1),
            *parameters.cells(trial),
            "" if study.budget_tokens is None else _bar(tokens, study.budget_tokens, width),
            short_count(tokens),
            "" if score is None else short_score(score),
        )
    hidden = len(running) - len(shown)
    return Group(table, *([Text(f"  … and {hidden} more")] if hidden else []))


def results_table(study: ReadStudy, *, width: int) -> RenderableType:
    """All trials that have ended: those that completed first, each kind by objective, best first."""
    ended = sorted(study.ended, key=lambda trial: _rank(study, trial))
    front = {trial.number for trial in study.pareto} if len(study.objectives) > 1 else set()
    best = {study.best.number} if study.best is not None else set()
    parameters = _Parameters(study, ended, width)
    table = new_table(f"{study.name}: {len(ended)} {'trial' if len(ended) == 1 else 'trials'} by {study.objectives[0]}")
    table.add_column("trial", justify="right")
    table.add_column("status")
    parameters.add_columns(table)
    for heading in (*study.objectives, "tokens", "seconds"):
        table.add_column(heading, justify="right", overflow="fold")
    for trial in ended:
        score, tokens = study.score_of(trial), study.tokens_of(trial)
        scores = trial.values or ([] if score is None else [score])
        table.add_row(
            f"{trial.number}{' *' if trial.number in front else ''}",
            status_of(trial).replace("_", " "),
            *parameters.cells(trial),
            *(short_score(value) for value in scores),
            *("" for _ in study.objectives[len(scores) :]),
            short_count(tokens) if tokens else "",
            f"{seconds_of(trial):,.1f}",
            style="bold" if trial.number in (front or best) else None,
        )
    note = [Text("* no other trial is better in one objective without being worse in another")] if front else []
    return Group(table, *note)


def seconds_left(study: ReadStudy, workers: int) -> float | None:
    """How long so many workers will need, from how long trials took, pruned ones included; None: unknown."""
    took = [seconds for trial in study.ended if (seconds := seconds_of(trial)) > 0]
    paces = [_whole_seconds(study, trial) for trial in study.running]
    known = took or [pace for pace in paces if pace is not None]
    if not workers or not known:
        return None
    mean = statistics.fmean(known)
    rests = [max(0.0, (pace or mean) - seconds_of(trial)) for trial, pace in zip(study.running, paces, strict=True)]
    waiting = 0 if study.stopped else study.counts["waiting"]
    return max(sum(rests, waiting * mean) / workers, *rests, 0.0)


def parameters_in_a_line(study: ReadStudy, trial: FrozenTrial) -> str:
    """`lr 0.0031, batch_size 8`."""
    names = short_names(study.parameters)
    return ", ".join(f"{names[name]} {short_value(value)}" for name, value in trial.params.items())


class _Parameters:
    """The parameters of some trials: a column each where they fit, else all in one."""

    def __init__(self, study: ReadStudy, trials: Sequence[FrozenTrial], width: int) -> None:
        self._study = study
        self._names = short_names(study.parameters)
        widths = (
            max(len(short), *(len(short_value(trial.params.get(name, ""))) for trial in trials), 0) + 2
            for name, short in self._names.items()
        )
        self._apart = sum(widths) <= width - _ROOM_OF_THE_REST

    def add_columns(self, table: Table) -> None:
        if not self._apart:
            table.add_column("parameters", overflow="fold", min_width=20)
            return
        for name, short in self._names.items():
            numbers = all(
                isinstance(trial.params.get(name, 0), int | float) for trial in self._study.trials if trial.params
            )
            table.add_column(short, justify="right" if numbers else "left")

    def cells(self, trial: FrozenTrial) -> list[Text]:
        if not self._apart:
            return [Text(parameters_in_a_line(self._study, trial))]
        return [Text(short_value(trial.params.get(name, ""))) for name in self._names]


def _best(study: ReadStudy) -> str:
    best = study.best
    return "" if best is None else f"best {short_score(best.values[0])} (trial {best.number})"


def _rest(study: ReadStudy, workers: int | None) -> str:
    """What is still to come; empty if nothing is."""
    if study.stopped is not None:
        return f"stopped: {study.stopped}"
    if study.is_over:
        return ""
    at_work = len(study.running) if workers is None else workers
    if not at_work:
        return NOBODY
    seconds = seconds_left(study, at_work)
    if seconds is None:
        return "" if study.running else "workers are starting"
    return f"about {_rounded(seconds)} left"


def _rounded(seconds: float) -> str:
    """A time nobody knows better than to a digit or two: 40 s, 6 min, 2 h 10 min."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60 // 10 * 10:02d} min"


def _whole_seconds(study: ReadStudy, trial: FrozenTrial) -> float | None:
    """How long a running trial will have taken if it goes to its end; None if that cannot be said yet."""
    budget, tokens = study.budget_tokens, study.tokens_of(trial)
    return None if budget is None or tokens < _PACE_FROM * budget else seconds_of(trial) * budget / tokens


def _rank(study: ReadStudy, trial: FrozenTrial) -> tuple[int, float, int]:
    """Where a trial stands in the table of results."""
    score = study.score_of(trial)
    sign = 1.0 if study.directions[0] == "minimize" else -1.0
    return KINDS.index(kind_of(trial)), math.inf if score is None else sign * score, trial.number


def _worker(trial: FrozenTrial, *, with_host: bool) -> Text:
    lease = lease_of(trial)
    if lease is None:
        return Text("")
    return Text(f"{lease.host}:{lease.worker}" if with_host else str(lease.worker))


def _bar(tokens: int, budget: int, width: int) -> ProgressBar:
    return ProgressBar(budget, min(tokens, budget), width=10 if width < 100 else 24)
