"""What all pictures share: the look of a figure, colours, and points out of metrics records.

Draws with matplotlib's objects on the Agg canvas: no window, no global state, safe in any thread. Colours are
those of Okabe and Ito, which people with any colour vision can tell apart.
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


def si_formatter() -> Any:
    """250k, 1.5M: short tick labels."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def save_figure(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
