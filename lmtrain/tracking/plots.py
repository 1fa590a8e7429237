"""Pictures of runs, drawn from their metrics records and written as PNG files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtrain.tracking.diagnostic_plots import draw_gradient_flow, draw_histograms
from lmtrain.tracking.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PALETTE,
    SKY,
    VERMILION,
    Records,
    new_figure,
    save_figure,
    series,
    si_formatter,
)
from lmtrain.tracking.histograms import read_histograms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_LEVELS = 6  # a setting with at most so many values gets a tick for each
_LABELLED_RUNS = 12  # a comparison names at most so many runs; the others are drawn grey
_LABELS = {
    "train/loss": "training loss (nats a token)",
    "val/loss": "validation loss (nats a token)",
    "val/perplexity": "validation perplexity",
    "val/bits_per_byte": "validation bits per byte",
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_second": "tokens per second",
}


def plot_run(records: Records, folder: Path, histograms: Path | None = None) -> list[Path]:
    """Draw one run as `loss.png` and `training.png`; what the records do not hold is left out.

    With diagnostics there are `gradient_flow.png` and, from the histograms file, `parameter_histograms.png`.

    Returns:
        The files written.
    """
    pictures = {
        "loss.png": _draw_loss(records),
        "training.png": _draw_training(records),
        "gradient_flow.png": draw_gradient_flow(records),
        "parameter_histograms.png": draw_histograms({} if histograms is None else read_histograms(histograms)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return [save_figure(figure, folder / name) for name, figure in pictures.items() if figure is not None]


def plot_comparison(runs: Sequence[tuple[str, Records]], path: Path) -> Path | None:
    """Draw the loss of several runs over the tokens they saw.

    Args:
        runs: label and records of each, best first.
        path: the PNG file to write.

    Returns:
        The file, or None when no run has a loss to show.
    """
    # One evaluation a run is no curve: the training loss then says more.
    evaluated = any(len(series(records, "val/loss")[0]) > 1 for _, records in runs)
    metric = "val/loss" if evaluated else "train/loss"
    curves = [(label, *series(records, metric, "tokens")) for label, records in runs]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return None
    figure, (axes,) = new_figure(width=9.0)
    for rank, (label, tokens, losses) in reversed(list(enumerate(curves))):
        named = rank < _LABELLED_RUNS
        axes.plot(
            tokens,
            losses,
            color=PALETTE[rank % len(PALETTE)] if named else GREY,
            linestyle="-" if rank < len(PALETTE) else "--",
            linewidth=1.8 if named else 0.8,
            marker="o" if len(tokens) < 30 else None,
            markersize=3,
            label=f"{label}  ({losses[-1]:.3f})" if named else None,
            zorder=3 if named else 2,
        )
    handles, labels = axes.get_legend_handles_labels()
    rest = len(curves) - len(handles)
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        title="run (last value)" + (f", {rest} more in grey" if rest else ""),
        alignment="left",
        frameon=False,
    )
    _limit_to_typical(axes, [losses for _, _, losses in curves])
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(si_formatter())
    axes.set_ylabel(_LABELS[metric])
    return save_figure(figure, path)


def plot_objective(points: Sequence[tuple[Mapping[str, Any], float]], objective: str, path: Path) -> Path | None:
    """Draw the objective against each setting that was swept, one panel a setting.

    Args:
        points: settings and objective of each run; those without a finite objective are left out.
        objective: the metric's name, for the axis.
        path: the PNG file to write.

    Returns:
        The file, or None when there is nothing to draw.
    """
    points = [(settings, value) for settings, value in points if math.isfinite(value)]
    keys = list(dict.fromkeys(key for settings, _ in points for key in settings))
    if not keys:
        return None
    columns = min(len(keys), 3)
    figure, panels = new_figure(
        rows=-(-len(keys) // columns), columns=columns, width=1.2 + 3.2 * columns, panel_height=3.4
    )
    best = min(value for _, value in points)
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
        axes.set_ylabel(_LABELS.get(objective, objective))
    panels[0].legend(loc="best", framealpha=0.8, edgecolor="none")
    return save_figure(figure, path)


def _draw_loss(records: Records) -> Figure | None:
    steps, losses = series(records, "train/loss")
    val_steps, val_losses = series(records, "val/loss")
    if not steps and not val_steps:
        return None
    figure, (axes,) = new_figure(width=8.0)
    if steps:
        smoothed = _smooth(losses)
        axes.plot(steps, losses, color=SKY, alpha=0.6, linewidth=0.8)
        axes.plot(steps, smoothed, color=BLUE, linewidth=1.8)
        above = not val_losses or smoothed[-1] > val_losses[-1]
        _label_end(axes, steps[-1], smoothed[-1], "train", BLUE, above=above)
    if val_steps:
        axes.plot(val_steps, val_losses, color=VERMILION, linewidth=1.8, marker="o", markersize=4)
        above = not steps or val_losses[-1] >= smoothed[-1]
        _label_end(axes, val_steps[-1], val_losses[-1], "val", VERMILION, above=above)
    _limit_to_typical(axes, [losses, val_losses])
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    _add_token_axis(axes, records)
    return figure


def _draw_training(records: Records) -> Figure | None:
    metrics = [
        (metric, colour)
        for metric, colour in (
            ("train/lr", BLUE),
            ("train/grad_norm", VERMILION),
            ("train/tokens_per_second", GREEN),
        )
        if series(records, metric)[0]
    ]
    if not metrics:
        return None
    figure, panels = new_figure(rows=len(metrics), width=8.0, panel_height=1.9, share_x=True)
    for axes, (metric, colour) in zip(panels, metrics, strict=True):
        steps, values = series(records, metric)
        axes.plot(steps, values, color=colour, linewidth=1.4)
        axes.set_ylabel(_LABELS[metric])
        if min(values) > 0 and max(values) > 20 * statistics.median(values):
            axes.set_yscale("log")  # a spike would squeeze the rest flat
        else:
            axes.set_ylim(bottom=0)
        if max(values) >= 10_000:
            axes.yaxis.set_major_formatter(si_formatter())
    panels[-1].set_xlabel("step")
    _add_token_axis(panels[0], records)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """Running median over a twentieth of the points: unlike a mean, it does not carry a spike along."""
    last, reach = len(values) - 1, len(values) // 40
    spans = ((i, min(i, last - i, reach)) for i in range(len(values)))
    return [statistics.median(values[i - span : i + span + 1]) for i, span in spans]


def _label_end(axes: Axes, x: float, y: float, text: str, colour: str, *, above: bool) -> None:
    """Name a curve at its last point."""
    axes.annotate(
        f"{text} {y:.3f}",
        (x, y),
        xytext=(8, 6 if above else -6),
        textcoords="offset points",
        color=colour,
        fontsize=10,
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )


def _limit_to_typical(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Let no spike above where the curves began squeeze the rest of the picture flat."""
    curves = [curve for curve in curves if curve]
    if curves:
        lowest, start = min(map(min, curves)), max(curve[0] for curve in curves)
        margin = 0.05 * (start - lowest) or 0.1
        axes.set_ylim(lowest - margin, start + margin)


def _add_token_axis(axes: Axes, records: Records) -> None:
    """A second axis on top: tokens seen. A step is always the same number of tokens."""
    last = max(records, key=lambda record: record["step"])
    if not last["step"] or not last.get("tokens"):
        return
    tokens_per_step = last["tokens"] / last["step"]
    scale: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (
        lambda step: step * tokens_per_step,
        lambda tokens: tokens / tokens_per_step,
    )
    top = axes.secondary_xaxis("top", functions=scale)
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(si_formatter())
    top.tick_params(colors=INK, labelsize=9)


def _place(axes: Axes, settings: Sequence[Any]) -> list[float]:
    """Where settings stand on the x axis: a few numbers get ticks of their own, words stand side by side."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in settings):
        names = sorted({str(value) for value in settings})
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        return [float(names.index(str(value))) for value in settings]
    levels = sorted({float(value) for value in settings})
    if _spread_over_magnitudes(levels):
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks([sub * 10.0**power for power in range(-12, 13) for sub in (1, 3)])
        axes.set_xlim(levels[0] / 1.2, levels[-1] * 1.2)
    if len(levels) <= _MAX_LEVELS:
        axes.set_xticks(levels)
    axes.xaxis.set_major_formatter("{x:g}")
    return [float(value) for value in settings]


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
