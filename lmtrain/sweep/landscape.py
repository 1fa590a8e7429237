"""Pictures of how an objective depends on the searched settings: importances, slices, contours, parallel coordinates.

Every setting is drawn over its whole range, as it was searched, so that an optimum at an end is seen as one. Drawn
here, not by Optuna's plots: those change matplotlib's global state, sort the choices 4, 8, 16 as words, and leave out
what pruned trials tell.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lmtrain.sweep.reading import ReadStudy
from lmtrain.sweep.scales import (
    ENOUGH,
    KIND_COLOURS,
    KIND_MARKERS,
    Sample,
    Scale,
    limits_of,
    sample_of,
    scales_of,
    typical_limits,
    value_of,
)
from lmtrain.tracking.drawing import GREY, INK, PALETTE, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MIN_FOR_CONTOURS = 4

_MAX_PAIRED = 4  # settings whose pairs are drawn as contours
_FOREST = 16  # trees of fANOVA; 64 change the shares by 0.02 and take four times as long


def importances(study: ReadStudy, objective: int = 0) -> dict[str, float]:
    """Share of an objective's variance over the trials that each setting explains, largest first.

    fANOVA (Hutter et al. 2014) in Optuna. Empty if there are too few trials or fewer than two settings.
    """
    scales, sample = scales_of(study), sample_of(study, objective)
    points = [(t, value) for t, value in zip(sample.trials, sample.values, strict=True) if set(scales) <= set(t.params)]
    if len(points) < ENOUGH or len(scales) < 2:
        return {}
    memory = optuna.create_study(direction="minimize")
    memory.add_trials(
        optuna.create_trial(
            state=TrialState.COMPLETE,
            value=value,
            params={name: trial.params[name] for name in scales},
            distributions={name: trial.distributions[name] for name in scales},
        )
        for trial, value in points
    )
    forest = optuna.importance.FanovaImportanceEvaluator(n_trees=_FOREST, seed=0)
    found = optuna.importance.get_param_importances(memory, evaluator=forest)
    return {name: float(share) for name, share in found.items()}


def draw_importances(study: ReadStudy) -> Figure | str:
    """A bar for each setting and objective."""
    shares = [study.importances, *(importances(study, index) for index in range(1, len(study.objectives)))]
    if not shares[0]:
        few = f"takes at least {ENOUGH} trials, there are {len(sample_of(study).trials)}"
        return few if len(scales_of(study)) > 1 else "takes at least two searched settings"
    names = list(reversed(shares[0]))
    figure, (axes,) = new_figure(width=7.0, panel_height=1.0 + 0.45 * len(names) * len(shares))
    height = 0.8 / len(shares)
    for index, (objective, share) in enumerate(zip(study.objectives, shares, strict=True)):
        places = [place - height * index for place in range(len(names))]
        bars = axes.barh(
            places,
            [share[name] for name in names],
            height=height,
            color=PALETTE[index],
            label=objective,
            **_hatch(index),
        )
        axes.bar_label(bars, labels=[f" {share[name]:.0%}" for name in names], color=INK)
    axes.set_yticks(range(len(names)), [scales_of(study)[name].name for name in names])
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("share of the variance explained")
    if len(shares) > 1:
        axes.legend(frameon=False)
    _add_note(figure, sample_of(study))
    return figure


def _hatch(index: int) -> dict[str, Any]:
    """What tells the bars of a further objective from those of the first."""
    return {"hatch": "./\\x"[index % 4] * 3, "edgecolor": "white"} if index else {}


def draw_slices(study: ReadStudy) -> Figure | str:
    """Each objective against each setting."""
    scales = list(scales_of(study).items())
    if not scales or not study.ranked:
        return "takes a completed trial"
    columns = _columns(len(scales))
    rows_each = -(-len(scales) // columns)
    figure, panels = new_figure(
        rows=rows_each * len(study.objectives), columns=columns, width=1.2 + 3.0 * columns, panel_height=3.0
    )
    for index, objective in enumerate(study.objectives):
        here = panels[index * rows_each * columns : (index + 1) * rows_each * columns]
        for position, axes in enumerate(here):
            if position >= len(scales):
                axes.set_visible(False)
                continue
            name, scale = scales[position]
            _scatter(axes, study, name, scale, index)
            if position % columns == 0:
                axes.set_ylabel(objective)
    _legend_below(figure, panels[0])
    return figure


def _scatter(axes: Axes, study: ReadStudy, name: str, scale: Scale, objective: int) -> None:
    points = {
        kind: [
            (scale.place(trial.params[name]), value)
            for trial in study.by_kind[kind]
            if name in trial.params and (value := value_of(study, trial, objective)) is not None
        ]
        for kind in KIND_COLOURS
    }
    limits = limits_of(study, objective)
    for order, (kind, found) in enumerate(reversed(points.items())):
        inside = [(place, min(max(value, limits[0]), limits[1])) for place, value in found]
        if inside:
            across, up = zip(*inside, strict=True)
            axes.scatter(
                across, up, s=30, color=KIND_COLOURS[kind], marker=KIND_MARKERS[kind], zorder=2 + order, label=kind
            )
    best = study.best
    if best is not None and name in best.params and best.values is not None:
        place, value = scale.place(best.params[name]), best.values[objective]
        axes.scatter(place, value, s=150, marker="*", color=VERMILION, zorder=9, label="best")
    axes.set_ylim(*limits)
    scale.dress(axes)


def draw_contours(study: ReadStudy) -> Figure | str:
    """The first objective over each pair of settings, the most important ones first."""
    scales = {name: scale for name, scale in scales_of(study).items() if scale.is_ordered}
    names = [name for name in dict.fromkeys([*study.importances, *scales]) if name in scales][:_MAX_PAIRED]
    sample = sample_of(study)
    drawn = [  # the best last, on top
        (trial, value)
        for trial, value in zip(sample.trials[::-1], sample.values[::-1], strict=True)
        if set(names) <= set(trial.params)
    ]
    trials, values = [trial for trial, _ in drawn], [value for _, value in drawn]
    pairs = list(itertools.combinations(names, 2))
    if not pairs:
        return "takes at least two searched settings that are numbers"
    if len(trials) < MIN_FOR_CONTOURS:
        return f"takes at least {MIN_FOR_CONTOURS} trials, there are {len(trials)}"
    columns = _columns(len(pairs))
    figure, panels = new_figure(
        rows=-(-len(pairs) // columns), columns=columns, width=1.6 + 3.2 * columns, panel_height=3.4
    )
    look = _colours(values, study.directions[0])
    for axes, (across, up) in zip(panels, pairs, strict=False):
        points = [(scales[across].place(trial.params[across]), scales[up].place(trial.params[up])) for trial in trials]
        _fill(axes, points, values, look)
        _mark_others(axes, study, trials, (across, up), scales)
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, c=values, s=34, edgecolors="white", linewidths=0.8, zorder=3, **look)
        best = [point for point, trial in zip(points, trials, strict=True) if _is_best(study, trial)]
        for x_best, y_best in best:
            axes.scatter(x_best, y_best, s=170, marker="*", color=VERMILION, edgecolors="white", zorder=4)
        scales[across].dress(axes, "x")
        scales[up].dress(axes, "y")
    for axes in panels[len(pairs) :]:
        axes.set_visible(False)
    _add_colour_bar(figure, panels, look, study.objectives[0])
    _add_note(figure, sample)
    return figure


def _fill(axes: Axes, points: Sequence[tuple[float, float]], values: Sequence[float], look: Mapping[str, Any]) -> None:
    """Colours between the points; nothing is claimed outside of them."""
    norm = look["norm"]
    mean: dict[tuple[float, float], list[float]] = {}
    for point, value in zip(points, values, strict=True):
        mean.setdefault(point, []).append(min(max(value, norm.vmin), norm.vmax))
    x, y = zip(*mean, strict=True)
    try:
        axes.tricontourf(x, y, [statistics.fmean(several) for several in mean.values()], levels=12, alpha=0.75, **look)
    except (ValueError, RuntimeError):  # fewer than three points, or all on one line
        return


def _mark_others(
    axes: Axes, study: ReadStudy, shown: Sequence[FrozenTrial], pair: tuple[str, str], scales: Mapping[str, Scale]
) -> None:
    """Crosses where trials without a comparable value were."""
    numbers = {trial.number for trial in shown}
    places = [
        tuple(scales[name].place(trial.params[name]) for name in pair)
        for trial in (*study.by_kind["pruned"], *study.by_kind["diverged"])
        if trial.number not in numbers and set(pair) <= set(trial.params)
    ]
    if places:
        x, y = zip(*places, strict=True)
        axes.scatter(x, y, s=22, marker="x", color=GREY, linewidths=1.2, zorder=2)


def draw_parallel_coordinates(study: ReadStudy) -> Figure | str:
    """A line for each trial through its settings to its first objective."""
    from matplotlib.ticker import MaxNLocator

    scales = scales_of(study)
    sample = sample_of(study)
    points = [(t, value) for t, value in zip(sample.trials, sample.values, strict=True) if set(scales) <= set(t.params)]
    if len(points) < 2 or not scales:
        return f"takes at least 2 trials, there are {len(points)}"
    values = [value for _, value in points]
    look = _colours(values, study.directions[0])
    low, high = look["norm"].vmin, look["norm"].vmax
    figure, (axes,) = new_figure(width=2.2 + 1.9 * len(scales), panel_height=4.4)
    for trial, value in reversed(points):
        shown = min(max((value - low) / (high - low), 0.0), 1.0)
        places = [*(scale.place(trial.params[name]) for name, scale in scales.items()), shown]
        colour, width, order = look["cmap"](look["norm"](value)), 1.3, 2
        if _is_best(study, trial):
            colour, width, order = VERMILION, 2.6, 3
        axes.plot(places, color=colour, linewidth=width, alpha=0.9, zorder=order)
    axes.set_xticks(range(len(scales) + 1), [*(scale.name for scale in scales.values()), study.objectives[0]])
    axes.set_xlim(-0.25, len(scales) + 0.3)
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    objective_ticks = [
        ((tick - low) / (high - low), f"{tick:g}")
        for tick in MaxNLocator(6).tick_values(low, high)
        if low <= tick <= high
    ]
    for position, ticks in enumerate([*(scale.ticks() for scale in scales.values()), objective_ticks]):
        axes.axvline(position, color=INK, linewidth=0.9, zorder=1)
        for place, label in ticks:
            axes.annotate(
                label,
                (position, place),
                xytext=(-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                zorder=4,  # above the lines
            ).set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})
    _add_note(figure, sample)
    return figure


def _is_best(study: ReadStudy, trial: FrozenTrial) -> bool:
    return study.best is not None and study.best.number == trial.number


def _columns(panels: int) -> int:
    return 2 if panels == 4 else min(panels, 3)


def _colours(values: Sequence[float], direction: str) -> dict[str, Any]:
    """Colour map and norm: the best is darkest."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    limits = typical_limits(values, direction)
    low, high = max(min(values), limits[0]), min(max(values), limits[1])
    norm = Normalize(low, high if high > low else low + 1e-9 + abs(low) * 1e-3)
    return {"cmap": colormaps["viridis" if direction == "minimize" else "viridis_r"], "norm": norm}


def _add_colour_bar(figure: Figure, panels: Sequence[Axes], look: Mapping[str, Any], label: str) -> None:
    from matplotlib.cm import ScalarMappable

    figure.colorbar(ScalarMappable(**look), ax=list(panels), label=label, fraction=0.04)


def _add_note(figure: Figure, sample: Sample) -> None:
    if sample.note:
        figure.suptitle(sample.note, fontsize=9, color=INK)


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False)
