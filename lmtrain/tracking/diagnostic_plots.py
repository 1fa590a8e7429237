"""Pictures of what diagnostics saw: the gradient over the depth of the model, and how weights are distributed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmtrain.tracking.drawing import Records, new_figure, series
from lmtrain.tracking.histograms import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_STEPS = 6  # drawn in one picture, spread over the run
_MAX_PANELS = 16  # layers with a panel of their own, spread over the depth
_MAX_NAMES = 20  # names of layers along an axis
_FLOW = {
    "diagnostics/grad_norm/": "gradient norm, not clipped",
    "diagnostics/update_ratio/": "norm of update / norm of weights",
}


def draw_gradient_flow(records: Records) -> Figure | None:
    """Gradient norm and update-to-weight ratio of each layer at some steps; None without diagnostics."""
    curves = {prefix: _over_depth(records, prefix) for prefix in _FLOW}
    layers, steps = curves["diagnostics/grad_norm/"]
    if not steps:
        return None
    figure, panels = new_figure(rows=2, width=8.5, panel_height=3.2, share_x=True)
    colours = _colours(_spread(list(steps), _MAX_STEPS))
    for axes, (prefix, label) in zip(panels, _FLOW.items(), strict=True):
        _, norms = curves[prefix]
        for step, colour in colours.items():
            axes.plot(norms.get(step, []), color=colour, linewidth=1.6, marker="o", markersize=4, label=f"{step:,}")
        axes.set_ylabel(label)
        if any(value > 0 for values in norms.values() for value in values):
            axes.set_yscale("log")
    named = _spread(list(range(len(layers))), _MAX_NAMES)
    names = [layers[i].replace("block_", "") if layers[i].startswith("block_") else layers[i] for i in named]
    panels[1].set_xticks(named, names)
    panels[1].set_xlabel("layer, from input to output (blocks by number)")
    _add_legend(figure, panels[0])
    return figure


def draw_histograms(histograms: Mapping[int, Mapping[str, Histogram]]) -> Figure | None:
    """The distribution of the weights of each layer at some steps; None without any."""
    if not histograms:
        return None
    colours = _colours(_spread(list(histograms), _MAX_STEPS))
    layers = _spread(list(next(iter(histograms.values()))), _MAX_PANELS)
    columns = min(len(layers), 3 if len(layers) <= 9 else 4)
    rows = -(-len(layers) // columns)
    figure, panels = new_figure(rows=rows, columns=columns, width=1.4 + 2.9 * columns, panel_height=2.4)
    for axes, layer in zip(panels, layers, strict=False):
        for step, colour in colours.items():
            if layer in histograms[step]:
                _draw_density(axes, histograms[step][layer], color=colour, label=f"{step:,}")
        axes.set_title(layer, fontsize=10, loc="left")
        axes.set_yscale("log")  # weights that begin at zero would squeeze the rest flat, and tails would not show
        axes.minorticks_off()  # they take half the time of drawing
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("weight", fontsize=10)
    figure.supylabel("density", fontsize=10)
    _add_legend(figure, panels[0])
    return figure


def _over_depth(records: Records, prefix: str) -> tuple[list[str], dict[int, list[float]]]:
    """Layers in the order of the model, and by step the value of each; NaN where one is missing or not finite."""
    metrics = list(dict.fromkeys(name for record in records for name in record if name.startswith(prefix)))
    by_step: dict[int, list[float]] = {}
    for number, metric in enumerate(metrics):
        for step, value in zip(*series(records, metric), strict=True):
            by_step.setdefault(int(step), [math.nan] * len(metrics))[number] = value
    return [metric.removeprefix(prefix) for metric in metrics], dict(sorted(by_step.items()))


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """All items, or `most` of them evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _colours(steps: Sequence[int]) -> dict[int, Any]:
    """A colour for each step, from dark early to light late."""
    from matplotlib import colormaps

    last = max(len(steps) - 1, 1)
    return {step: colormaps["viridis"](0.9 * i / last) for i, step in enumerate(steps)}


def _draw_density(axes: Axes, histogram: Histogram, **style: Any) -> None:
    """Outline of a histogram with area 1, so that those with other bins compare."""
    width = (histogram.high - histogram.low) / len(histogram.counts)
    total = max(sum(histogram.counts), 1)
    edges = [histogram.low + i * width for i in range(len(histogram.counts) + 1)]
    axes.stairs([count / total / width for count in histogram.counts], edges, linewidth=1.3, **style)


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="step", alignment="left", frameon=False)
