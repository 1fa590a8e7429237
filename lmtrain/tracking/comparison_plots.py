"""Pictures of several runs together, written as PNG files: their curves, and the objective against what differs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtrain.tracking.drawing import (
    BLUE,
    GREY,
    LABELS,
    STYLES,
    VERMILION,
    Records,
    limit_to_typical,
    new_figure,
    save_figure,
    series,
    si_formatter,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_LEVELS = 6  # a setting with at most so many values gets a tick for each
_MAX_WORDS = 24  # of values that are words: more have no names
_ROOM_FOR_WORDS = 30  # characters side by side below a panel
_ROOM_FOR_A_NUMBER = 0.16  # of the width of a panel
_MAX_PANELS = 12  # settings that get a panel, the first ones


def plot_comparison(runs: Sequence[tuple[str, Records]], path: Path) -> Path | None:
    """Draw the loss of several runs over the tokens they saw.

    Args:
        runs: label and records of each, best first.
        path: the PNG file to write.

    Returns:
        The file, or None when no run has a loss to show.
    """
    from matplotlib.collections import LineCollection

    # One evaluation a run is no curve: the training loss then says more.
    evaluated = any(len(series(records, "val/loss")[0]) > 1 for _, records in runs)
    metric = "val/loss" if evaluated else "train/loss"
    curves = [(label, *series(records, metric, "tokens")) for label, records in runs]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return None
    named, others = curves[: len(STYLES)], curves[len(STYLES) :]
    figure, (axes,) = new_figure(width=10.0)
    axes.add_collection(
        LineCollection(
            [list(zip(*points, strict=True)) for _, *points in others], colors=GREY, linewidths=0.8, zorder=2
        )
    )
    for rank, (label, tokens, losses) in enumerate(named):
        axes.plot(
            tokens,
            losses,
            **STYLES[rank],
            linewidth=1.8,
            markersize=5,
            markevery=_marked(len(tokens), rank),
            label=f"{label}  ({losses[-1]:.3f})",
            zorder=4 - rank / len(STYLES),
        )
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        title="run (last value)" + (f", {len(others)} more in grey" if others else ""),
        alignment="left",
        frameon=False,
        fontsize=8.5,
        title_fontsize=8.5,
    )
    axes.autoscale_view()
    limit_to_typical(axes, [losses for _, _, losses in named])
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(si_formatter())
    axes.set_ylabel(LABELS[metric])
    return save_figure(figure, path)


def plot_objective(
    points: Sequence[tuple[Mapping[str, Any], float]], objective: str, path: Path, *, highest: bool = False
) -> Path | None:
    """Draw the objective against each setting that was swept, one panel a setting.

    Args:
        points: settings and objective of each run; those without a finite objective are left out.
        objective: the metric's name, for the axis.
        highest: whether the highest is the best.
        path: the PNG file to write.

    Returns:
        The file, or None when there is nothing to draw.
    """
    points = [(settings, value) for settings, value in points if math.isfinite(value)]
    keys = dict.fromkeys(key for settings, _ in points for key in settings)
    varied = [key for key in keys if len({str(settings.get(key)) for settings, _ in points}) > 1]
    keys = dict.fromkeys((varied or list(keys))[:_MAX_PANELS])
    if not keys:
        return None
    columns = min(len(keys), 3)
    figure, panels = new_figure(
        rows=-(-len(keys) // columns), columns=columns, width=1.2 + 3.2 * columns, panel_height=3.4
    )
    best = (max if highest else min)(value for _, value in points)
    for axes, key in zip(panels, keys, strict=False):
        pairs = [(settings[key], value) for settings, value in points if key in settings]
        positions = _place(axes, [setting for setting, _ in pairs])
        axes.scatter(positions, [value for _, value in pairs], s=28, color=BLUE, alpha=0.75, linewidths=0)
        winners = [place for place, (_, value) in zip(positions, pairs, strict=True) if value == best]
        axes.scatter(winners, [best] * len(winners), s=120, marker="*", color=VERMILION, label="best")
        axes.set_xlabel(key)
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(LABELS.get(objective, objective))
    panels[0].legend(loc="best", framealpha=0.8, edgecolor="none")
    return save_figure(figure, path)


def _place(axes: Axes, settings: Sequence[Any]) -> list[float]:
    """Where settings stand on the x axis: a few numbers get ticks of their own, words stand side by side."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in settings):
        names = sorted({str(value) for value in settings})
        few = len(names) <= _MAX_WORDS
        axes.set_xticks(range(len(names)) if few else [], [_shortened(name) for name in names] if few else [])
        if sum(map(len, names)) > _ROOM_FOR_WORDS:
            axes.tick_params(axis="x", rotation=90)
        axes.set_xlim(-0.5, len(names) - 0.5)
        return [float(names.index(str(value))) for value in settings]
    levels = sorted({float(value) for value in settings})
    if _spread_over_magnitudes(levels):
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks([sub * 10.0**power for power in range(-12, 13) for sub in (1, 3)])
        axes.set_xlim(levels[0] / 1.2, levels[-1] * 1.2)
    if len(levels) <= _MAX_LEVELS and _lie_apart(levels, logarithmic=axes.get_xscale() == "log"):
        axes.set_xticks(levels)
    axes.xaxis.set_major_formatter("{x:.4g}")
    return [float(value) for value in settings]


def _lie_apart(levels: Sequence[float], *, logarithmic: bool) -> bool:
    """Whether there is room for the number of each on an axis."""
    places = [math.log(level) for level in levels] if logarithmic else levels
    span = places[-1] - places[0]
    return all(after - before >= _ROOM_FOR_A_NUMBER * span for before, after in itertools.pairwise(places))


def _shortened(name: str) -> str:
    return name if len(name) <= _ROOM_FOR_WORDS else f"…{name[1 - _ROOM_FOR_WORDS :]}"


def _marked(count: int, rank: int) -> Any:
    """Which points of a curve carry its marker: all of a few, else eight, beside those of the other curves."""
    if count <= 16:
        return None
    every = count // 8
    return (rank * every // len(STYLES), every)


def _spread_over_magnitudes(levels: Sequence[float]) -> bool:
    """Whether sorted numbers were chosen on a logarithmic scale, judged by where their median lies."""
    if levels[0] <= 0 or levels[-1] < 4 * levels[0]:
        return False
    median, geometric, arithmetic = (
        statistics.median(levels),
        math.sqrt(levels[0] * levels[-1]),
        (levels[0] + levels[-1]) / 2,
    )
    return abs(median - geometric) < abs(median - arithmetic)
