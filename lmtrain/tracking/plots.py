"""Pictures of a run, drawn from its metrics records and written as PNG files."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtrain.tracking.diagnostic_plots import draw_gradient_flow, draw_histograms
from lmtrain.tracking.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LABELS,
    ORANGE,
    PURPLE,
    SKY,
    STYLES,
    VERMILION,
    Records,
    limit_to_typical,
    new_figure,
    save_figure,
    series,
    si_formatter,
)
from lmtrain.tracking.histograms import read_histograms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_TRAINING = {
    "train/lr": BLUE,
    "train/grad_norm": VERMILION,
    "train/tokens_per_second": GREEN,
    "train/mfu": ORANGE,
    "train/memory_gib": PURPLE,
}
_EVALUATION = {"val/loss": VERMILION, "val/perplexity": BLUE, "val/bits_per_byte": GREEN}
_SYSTEM = "system/"
_PERCENTAGE = "_percentage"
_SMOOTHED_POINTS = 1000  # of a curve: more cannot be seen


def plot_run(records: Records, folder: Path, histograms: Path | None = None) -> list[Path]:
    """Draw one run; what the records do not hold is left out.

    `loss.png`, `evaluation.png` (loss, perplexity, bits per byte), `training.png` (learning rate, gradient norm,
    throughput, memory) and `system.png` (how busy the machine was), over steps and tokens. With diagnostics there are
    `gradient_flow.png` and, from the histograms file, `parameter_histograms.png`.

    Returns:
        The files written.
    """
    started = time.monotonic()
    pictures = {
        "loss.png": _draw_loss(records),
        "evaluation.png": _draw_panels(records, _EVALUATION, mark_lowest=True),
        "training.png": _draw_panels(records, _TRAINING),
        "system.png": _draw_system(records),
        "gradient_flow.png": draw_gradient_flow(records),
        "parameter_histograms.png": draw_histograms({} if histograms is None else read_histograms(histograms)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = [save_figure(figure, folder / name) for name, figure in pictures.items() if figure is not None]
    log.debug("drew %s in %.2f s", ", ".join(path.name for path in written), time.monotonic() - started)
    return written


def _draw_loss(records: Records) -> Figure | None:
    steps, losses = series(records, "train/loss")
    val_steps, val_losses = series(records, "val/loss")
    if not steps and not val_steps:
        return None
    figure, (axes,) = new_figure(width=8.0)
    last = losses[-1] if losses else 0.0
    if steps:
        smooth_steps, smoothed = _smooth(steps, losses)
        last = smoothed[-1]
        axes.plot(steps, losses, color=SKY, alpha=0.6, linewidth=0.8)
        axes.plot(smooth_steps, smoothed, color=BLUE, linewidth=1.8, marker="s" if len(steps) < 3 else None)
        _label_end(axes, steps[-1], last, "train", BLUE, above=not val_losses or last > val_losses[-1])
    if val_steps:
        axes.plot(val_steps, val_losses, color=VERMILION, linewidth=1.8, marker="o", markersize=4)
        _label_end(axes, val_steps[-1], val_losses[-1], "val", VERMILION, above=not steps or val_losses[-1] >= last)
    limit_to_typical(axes, [losses, val_losses])
    axes.set_ylabel("loss (nats a token)")
    _dress([axes], records)
    return figure


def _draw_panels(records: Records, colours: Mapping[str, str], *, mark_lowest: bool = False) -> Figure | None:
    """A panel for each metric that was measured, one below the other."""
    found = {metric: points for metric in colours if (points := series(records, metric))[0]}
    if not found:
        return None
    figure, panels = new_figure(rows=len(found), width=8.0, panel_height=1.9, share_x=True)
    for axes, (metric, (steps, values)) in zip(panels, found.items(), strict=True):
        marker = "o" if len(steps) < 3 or mark_lowest else None
        axes.plot(steps, values, color=colours[metric], linewidth=1.4, marker=marker, markersize=4)
        axes.set_ylabel(LABELS[metric].removeprefix("validation ").replace(" (", "\n("))
        if mark_lowest:
            _mark_lowest(axes, steps, values)
            limit_to_typical(axes, [values])
        elif min(values) > 0 and max(values) > 20 * statistics.median(values):
            axes.set_yscale("log")  # a spike would squeeze the rest flat
        else:
            axes.set_ylim(bottom=0)
        if max(values) >= 10_000 and not mark_lowest:
            axes.yaxis.set_major_formatter(si_formatter())
    _dress(panels, records)
    return figure


def _draw_system(records: Records) -> Figure | None:
    """Everything about the machine that was measured in percent."""
    names = dict.fromkeys(name for one in records for name in one if name.startswith(_SYSTEM))
    curves = [(name, *series(records, name)) for name in names if name.endswith(_PERCENTAGE)][: len(STYLES)]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return None
    figure, (axes,) = new_figure(width=8.0)
    for style, (name, steps, values) in zip(STYLES, curves, strict=False):
        label = name.removeprefix(_SYSTEM).removesuffix(_PERCENTAGE).replace("_", " ")
        axes.plot(steps, values, **style, linewidth=1.4, markersize=4, markevery=max(1, len(steps) // 8), label=label)
    axes.set_ylim(0, 103)
    axes.set_ylabel("in use (%)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    _dress([axes], records)
    return figure


def _dress(panels: Sequence[Axes], records: Records) -> None:
    """What all pictures over steps have: steps below, tokens above, and where the run was resumed."""
    from matplotlib.ticker import MaxNLocator

    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
    _mark_resumptions(panels, records)
    _add_token_axis(panels[0], records)


def _smooth(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Running median over a twentieth of the points: unlike a mean, it does not carry a spike along."""
    last, reach = len(values) - 1, len(values) // 40
    chosen = np.unique(np.linspace(0, last, min(len(values), _SMOOTHED_POINTS)).round().astype(int)).tolist()
    spans = [(i, min(i, last - i, reach)) for i in chosen]
    return [steps[i] for i in chosen], [float(np.median(values[i - span : i + span + 1])) for i, span in spans]


def _mark_lowest(axes: Axes, steps: Sequence[float], values: Sequence[float]) -> None:
    """A star and the number; of a curve that ends there, that is where it ended."""
    step, lowest = min(zip(steps, values, strict=True), key=lambda point: point[1])
    axes.scatter([step], [lowest], marker="*", s=110, color=INK, zorder=5)
    _label_end(axes, step, lowest, "lowest", INK, above=True)


def _mark_resumptions(panels: Sequence[Axes], records: Records) -> None:
    """A dotted line where a later attempt went on, named in the first panel."""
    for before, after in itertools.pairwise(records):
        if after.get("attempt", 0) != before.get("attempt", 0):
            for axes in panels:
                axes.axvline(before["step"], color=GREY, linestyle=":", linewidth=1.4, zorder=1)
            panels[0].annotate(
                "resumed",
                (before["step"], 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 4),
                textcoords="offset points",
                fontsize=7,
                color=INK,
            )


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


def _add_token_axis(axes: Axes, records: Records) -> None:
    """A second axis on top: tokens seen. Between records, and beyond, a step is taken for as many as around it."""
    seen = {record["step"]: record["tokens"] for record in records if record.get("tokens") and record["step"]}
    steps = np.array([0.0, *sorted(seen)])
    tokens = np.array([0.0, *(seen[step] for step in sorted(seen))])
    if len(steps) < 2 or (np.diff(tokens) <= 0).any():
        return

    def interpolate(x: Any, known: Any, wanted: Any) -> Any:
        slope = wanted[-1] / known[-1]
        beyond = np.where(x < 0, x * slope, wanted[-1] + (x - known[-1]) * slope)
        return np.where((x < 0) | (x > known[-1]), beyond, np.interp(x, known, wanted))

    top = axes.secondary_xaxis(
        "top",
        functions=(lambda step: interpolate(step, steps, tokens), lambda count: interpolate(count, tokens, steps)),
    )
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(si_formatter())
    top.tick_params(colors=INK, labelsize=9)
