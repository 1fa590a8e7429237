"""What all pictures share: the look of a figure, colours, and points out of metrics records.

Draws with matplotlib's objects on the Agg canvas: no window, no global state, safe in any thread. Colours are
those of Okabe and Ito, which people with any colour vision can tell apart; where curves or points must be told apart,
line styles and markers say the same, for who prints in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
GREY, INK = "#B8B8B8", "#333333"
_DASHES = ((), (6, 2), (1.2, 1.6), (6, 2, 1.2, 2))
_MARKERS = "os^DvPX*<>ph"
STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": PALETTE[i % len(PALETTE)], "dashes": _DASHES[i % len(_DASHES)], "marker": marker}
    for i, marker in enumerate(_MARKERS)
)
"""Looks of curves in one picture, each with a marker of its own; a curve more than these is drawn grey."""

LABELS = {
    "train/loss": "training loss (nats a token)",
    "val/loss": "validation loss (nats a token)",
    "val/perplexity": "validation perplexity",
    "val/bits_per_byte": "validation bits per byte",
    "train/lr": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_second": "tokens per second",
    "train/mfu": "model FLOPs utilisation",
    "train/memory_gib": "memory (GiB)",
    "run/seconds": "seconds",
    "run/parameters": "parameters",
}
"""Of axes."""

_DPI = 150
Records = Sequence[Mapping[str, float]]


def series(records: Records, metric: str, over: str = "step") -> tuple[list[float], list[float]]:
    """The points of a metric, those that are not finite left out."""
    points = [(record[over], record[metric]) for record in records if metric in record]
    points = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def new_figure(
    *, rows: int = 1, columns: int = 1, width: float, panel_height: float = 4.4, share_x: bool = False
) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = panel_height * rows if rows > 1 else max(panel_height, 4.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=share_x).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=9)
    return figure, panels


def limit_to_typical(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Let no spike above where the curves began squeeze the rest of the picture flat."""
    curves = [curve for curve in curves if curve]
    if curves:
        lowest, start = min(map(min, curves)), max(curve[0] for curve in curves)
        margin = 0.05 * (start - lowest) or 0.1
        axes.set_ylim(lowest - margin, start + margin)


def si_formatter() -> Any:
    """250k, 1.5M: short tick labels."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def save_figure(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
