"""The pictures of a study, written as PNG files: how it went (here), and what it found (`landscape`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optuna.trial import FrozenTrial

from lmtrain.errors import RunFolderError
from lmtrain.run_dir import RunDir
from lmtrain.sweep.landscape import draw_contours, draw_importances, draw_parallel_coordinates, draw_slices
from lmtrain.sweep.reading import ReadStudy, kind_of
from lmtrain.sweep.scales import KIND_COLOURS, KIND_MARKERS, limits_of, typical_limits, value_of
from lmtrain.sweep.study import attempts_of, lease_of
from lmtrain.tracking.drawing import (
    GREEN,
    GREY,
    INK,
    PURPLE,
    VERMILION,
    new_figure,
    save_figure,
    series,
    si_formatter,
)
from lmtrain.tracking.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAR_COLOURS = KIND_COLOURS | {"infeasible": PURPLE, "failed": INK, "running": GREEN, "waiting": GREEN}
_BAR_HATCHES = {"diverged": "xx", "infeasible": "..", "waiting": "--"}
_CURVE_STYLES = {"diverged": "--", "infeasible": "-.", "failed": ":", "running": (0, (1, 3))}
_WIDE = 8.5  # inches
_LONGEST_PAUSE = 0.1  # of the time worked: a longer time in which nobody worked is cut out of the timeline
_LABELLED_SHARE = 0.025  # of the width of the timeline: a bar this long has room for its number


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a report."""

    title: str
    caption: str
    path: Path | None  # None: there is none
    missing: str = ""  # why
    is_wide: bool = False  # of several panels side by side


def draw_study(study: ReadStudy, folder: Path) -> list[Picture]:
    """Draw a study into `folder`; what there is not enough for is left out, with the reason, its old file removed."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, (title, caption, draw) in _PICTURES.items():
        if name == "pareto" and len(study.objectives) == 1:
            continue
        path, drawn = folder / f"{name}.png", draw(study)
        if isinstance(drawn, str):
            path.unlink(missing_ok=True)
            pictures.append(Picture(title=title, caption=caption, path=None, missing=drawn))
        else:
            wide = drawn.get_figwidth() > _WIDE
            pictures.append(Picture(title=title, caption=caption, path=save_figure(drawn, path), is_wide=wide))
    return pictures


def draw_history(study: ReadStudy) -> Figure | str:
    """Each objective over the number of the trial, with the best so far."""
    if not any(value_of(study, trial) is not None for trial in study.trials):
        return "no trial has a value yet"
    figure, panels = new_figure(rows=len(study.objectives), width=8.0, panel_height=3.8)
    for index, (axes, objective) in enumerate(zip(panels, study.objectives, strict=True)):
        _draw_one_history(axes, study, index)
        axes.set_ylabel(objective)
    panels[-1].set_xlabel("trial")
    panels[0].legend(loc="upper right", framealpha=0.85, edgecolor="none")
    return figure


def _draw_one_history(axes: Axes, study: ReadStudy, objective: int) -> None:
    from matplotlib.ticker import MaxNLocator

    values = {trial.number: value_of(study, trial, objective) for trial in study.trials}
    known = {number: value for number, value in values.items() if value is not None}
    if not known:
        return
    limits = limits_of(study, objective)
    for order, (kind, colour) in enumerate(reversed(KIND_COLOURS.items())):
        numbers = [trial.number for trial in study.by_kind[kind] if trial.number in known]
        shown = [min(max(known[number], limits[0]), limits[1]) for number in numbers]
        if numbers:
            axes.scatter(numbers, shown, s=30, color=colour, marker=KIND_MARKERS[kind], label=kind, zorder=2 + order)
    better = min if study.directions[objective] == "minimize" else max
    ranked = sorted(study.ranked, key=lambda trial: trial.number)
    if ranked:
        reached = list(itertools.accumulate((known[trial.number] for trial in ranked), better))
        end = max(trial.number for trial in study.trials)
        numbers = [*(trial.number for trial in ranked), end]
        axes.step(numbers, [*reached, reached[-1]], where="post", color=VERMILION, linewidth=1.8, label="best so far")
    axes.set_ylim(*limits)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_learning_curves(study: ReadStudy) -> Figure | str:
    """The first objective of every trial over the tokens it saw."""
    curves = [(trial, *_curve(study, trial)) for trial in study.trials]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return "no trial was evaluated"
    figure, (axes,) = new_figure(width=8.0)
    order = list(KIND_COLOURS)
    seen: set[str] = set()
    for trial, tokens, values in curves:
        kind = "best" if study.best is not None and trial.number == study.best.number else kind_of(trial)
        axes.plot(
            tokens,
            values,
            color=VERMILION if kind == "best" else _BAR_COLOURS[kind],
            linewidth=2.4 if kind == "best" else 1.1,
            linestyle=_CURVE_STYLES.get(kind, "-"),
            alpha=1.0 if kind == "best" else 0.7,
            marker="o" if kind == "best" or len(tokens) == 1 else None,
            markersize=4,
            zorder=9 if kind == "best" else 5 - order.index(kind) if kind in order else 2,
            label=None if kind in seen else f"best: trial {trial.number}" if kind == "best" else kind,
        )
        seen.add(kind)
    tame = [values for trial, _, values in curves if kind_of(trial) != "diverged"] or [curves[0][2]]
    axes.set_ylim(*typical_limits(list(itertools.chain(*tame)), study.directions[0]))
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(si_formatter())
    axes.set_ylabel(study.objectives[0])
    axes.legend(loc="upper right", framealpha=0.85, edgecolor="none")
    return figure


def _curve(study: ReadStudy, trial: FrozenTrial) -> tuple[list[float], list[float]]:
    """Tokens and values: from the metrics file where it is here, else what the study was told."""
    try:
        return series(read_metrics(RunDir(study.folder_of(trial)).metrics), study.objectives[0], "tokens")
    except RunFolderError:
        reported = sorted(trial.intermediate_values.items())
        return [float(tokens) for tokens, _ in reported], [value for _, value in reported]


@dataclass(frozen=True)
class _Bar:
    """One attempt at a trial."""

    worker: str
    begun: float  # seconds since the epoch
    ended: float
    number: int  # of the trial
    kind: str  # of the trial
    is_last: bool  # no later attempt went on with it


def draw_timeline(study: ReadStudy) -> Figure | str:
    """What each worker did when. Times in which nobody worked are cut out."""
    bars = _bars(study)
    if not bars:
        return "no worker of this study has ended a trial"
    workers = sorted({bar.worker for bar in bars})
    shifts = _without_pauses(bars)
    span = max(bar.ended - _shift(shifts, bar.begun) for bar in bars)
    unit, seconds = ("hours", 3600.0) if span > 7200 else ("minutes", 60.0) if span > 120 else ("seconds", 1.0)
    figure, (axes,) = new_figure(width=9.0)
    figure.set_figheight(1.5 + 0.5 * len(workers))  # lower than other pictures where there is one worker
    rows = [workers.index(bar.worker) for bar in bars]
    begins = [bar.begun - _shift(shifts, bar.begun) for bar in bars]
    lengths = [bar.ended - bar.begun for bar in bars]
    drawn = axes.barh(
        rows,
        [length / seconds for length in lengths],
        left=[begin / seconds for begin in begins],
        height=0.72,
        color=[_BAR_COLOURS[bar.kind] for bar in bars],
        edgecolor="white",
        linewidth=0.6,
    )
    for bar, patch, row, begin, length in zip(bars, drawn, rows, begins, lengths, strict=True):
        patch.set_hatch(_BAR_HATCHES.get(bar.kind, "") + ("" if bar.is_last else "///") or None)
        if length > _LABELLED_SHARE * span:
            middle = (begin + length / 2) / seconds
            axes.annotate(str(bar.number), (middle, row), ha="center", va="center", fontsize=8, color="white")
    for begun, _ in shifts[1:]:
        axes.axvline((begun - _shift(shifts, begun)) / seconds, color=INK, linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(workers)), workers)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    busy = sum(bar.ended - bar.begun for bar in bars) / (span * len(workers))
    axes.set_xlabel(f"{unit} since the start; workers busy {busy:.0%} of the time")
    _legend_of_kinds(figure, bars)
    return figure


def _bars(study: ReadStudy) -> list[_Bar]:
    bars = []
    for trial in study.trials:
        attempts = attempts_of(trial)
        if kind_of(trial) == "running" and (lease := lease_of(trial)) is not None:
            now = {"worker": lease.worker, "host": lease.host, "begun": lease.begun, "ended": lease.renewed}
            attempts = [*attempts, now]
        for number, attempt in enumerate(attempts, start=1):
            worker = f"{attempt['host']} · {attempt['worker']}"
            last = number == len(attempts)
            bars.append(_Bar(worker, attempt["begun"], attempt["ended"], trial.number, kind_of(trial), last))
    return bars


def _without_pauses(bars: Sequence[_Bar]) -> list[tuple[float, float]]:
    """(instant, what to subtract from all times from there on): the start, and the end of each long pause."""
    ordered = sorted(bars, key=lambda bar: bar.begun)
    longest = _LONGEST_PAUSE * sum(bar.ended - bar.begun for bar in bars)
    shifts = [(ordered[0].begun, ordered[0].begun)]
    until = ordered[0].ended
    for bar in ordered[1:]:
        if bar.begun - until > longest:
            shifts.append((bar.begun, shifts[-1][1] + bar.begun - until))
        until = max(until, bar.ended)
    return shifts


def _shift(shifts: Sequence[tuple[float, float]], instant: float) -> float:
    return next(shift for begun, shift in reversed(shifts) if instant >= begun)


def _legend_of_kinds(figure: Figure, bars: Sequence[_Bar]) -> None:
    from matplotlib.patches import Patch

    present = {bar.kind for bar in bars}
    handles = [
        Patch(facecolor=_BAR_COLOURS[kind], edgecolor="white", hatch=_BAR_HATCHES.get(kind), label=kind)
        for kind in _BAR_COLOURS
        if kind in present
    ]
    if not all(bar.is_last for bar in bars):
        handles.append(Patch(facecolor=GREY, edgecolor="white", hatch="///", label="interrupted, gone on with later"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def draw_pareto(study: ReadStudy) -> Figure | str:
    """The first objective against each other one; on the front no trial is better in all."""
    if len(study.ranked) < 2:
        return f"takes at least 2 completed trials, there are {len(study.ranked)}"
    others = range(1, len(study.objectives))
    figure, panels = new_figure(columns=len(others), width=1.5 + 5.0 * len(others), panel_height=4.4)
    front = {trial.number for trial in study.pareto}
    for index, axes in zip(others, panels, strict=True):
        for on_front in (False, True):
            points = [(t.values[index], t.values[0]) for t in study.ranked if (t.number in front) == on_front]
            if points:
                colour, label = (VERMILION, "Pareto front") if on_front else (GREY, "beaten")
                x, y = zip(*points, strict=True)
                axes.scatter(x, y, s=36, color=colour, label=label, zorder=2 + on_front)
        if len(study.objectives) == 2:
            line = sorted((t.values[index], t.values[0]) for t in study.pareto)
            # What the front beats lies above it, and to the side on which its other objective is worse.
            side: Literal["post", "pre"] = "post" if study.directions[1] == "minimize" else "pre"
            axes.step(*zip(*line, strict=True), where=side, color=VERMILION, linewidth=1.4)
        for trial in study.pareto:
            at = trial.values[index], trial.values[0]
            axes.annotate(str(trial.number), at, xytext=(5, 5), textcoords="offset points", fontsize=8, color=INK)
        axes.set_xlabel(study.objectives[index])
        axes.set_ylabel(study.objectives[0])
        axes.set_ylim(*typical_limits([t.values[0] for t in study.ranked], study.directions[0]))
    panels[0].legend(framealpha=0.85, edgecolor="none")
    return figure


_PICTURES: dict[str, tuple[str, str, Callable[[ReadStudy], Figure | str]]] = {
    "history": ("History", "Each trial in turn; a pruned one with the value it had when it was ended.", draw_history),
    "pareto": (
        "Pareto front",
        "On the front, no other trial is better in one objective without being worse in another.",
        draw_pareto,
    ),
    "learning_curves": ("Learning curves", "Every trial, at equal tokens.", draw_learning_curves),
    "importances": (
        "Importances",
        "Which settings the result depended on, within the ranges searched (fANOVA). "
        "With fewer than about 30 trials a rough guide.",
        draw_importances,
    ),
    "slices": (
        "Slices",
        "Each setting over its whole range. Pruned trials with the value they had, after fewer tokens.",
        draw_slices,
    ),
    "contours": (
        "Contours",
        "Pairs of settings that are numbers; the star is the best of the study, crosses were pruned before. "
        "Colours lie between the points only; other settings differ too, so expect ripples.",
        draw_contours,
    ),
    "parallel_coordinates": (
        "Parallel coordinates",
        "A line for each trial, the best of the study in red.",
        draw_parallel_coordinates,
    ),
    "timeline": ("Timeline", "Which worker was at which trial. Dotted: a pause between two commands.", draw_timeline),
}
