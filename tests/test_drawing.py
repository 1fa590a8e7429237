"""Pictures for every pair of eyes: colours stay apart, and nothing is told by hue alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from colour_vision import DEFICIENCIES, distance, lab, lightness_between
from matplotlib.colors import to_hex
from test_plots import run_records

from lmtrain.sweep.scales import KIND_COLOURS, KIND_MARKERS
from lmtrain.tracking import comparison_plots, plots
from lmtrain.tracking.drawing import BLUE, GREY, INK, PALETTE, SKY, STYLES, VERMILION

APART = 15  # CIE 1976: six times what is just noticed
GREY_APART = 20  # of 100, between colours that no form tells apart

TOGETHER = {
    "curves of runs": PALETTE,
    "losses of a run": (SKY, BLUE, VERMILION),
    "kinds of trials, and the best": (*KIND_COLOURS.values(), VERMILION),
    "named and other runs": (*PALETTE[:3], *PALETTE[4:], GREY),
}


@pytest.mark.parametrize("deficiency", [None, *DEFICIENCIES])
@pytest.mark.parametrize("picture", TOGETHER)
def test_colours_used_together_stay_apart(picture: str, deficiency: str | None) -> None:
    for one, other in itertools.combinations(TOGETHER[picture], 2):
        assert distance(one, other, deficiency) > APART, (one, other)


def test_the_simulation_tells_what_is_known() -> None:
    """Red and green of equal lightness fall together for deuteranopes, blue and green for tritanopes; white stays."""
    assert distance("#c05030", "#708030") > 50
    assert distance("#c05030", "#708030", "deuteranopia") < 15
    assert distance("#00a0c0", "#00a878", "tritanopia") < distance("#00a0c0", "#00a878") / 2
    for deficiency in DEFICIENCIES:
        assert lab("#ffffff", deficiency) == pytest.approx(lab("#ffffff"), abs=0.5)
    assert lab("#ffffff") == pytest.approx([100, 0, 0], abs=0.1)


def test_every_curve_of_a_comparison_has_a_form_of_its_own() -> None:
    assert len({style["marker"] for style in STYLES}) == len(STYLES)
    for one, other in itertools.pairwise(STYLES):
        assert one["dashes"] != other["dashes"]
    for style in STYLES:
        assert [
            other for other in STYLES if (other["color"], other["dashes"]) == (style["color"], style["dashes"])
        ] == [style], "where markers are far between, colour and dashes tell the curves apart"


def test_kinds_of_trials_have_markers_of_their_own() -> None:
    assert KIND_MARKERS.keys() == KIND_COLOURS.keys()
    assert len(set(KIND_MARKERS.values())) == len(KIND_MARKERS)


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure of a run and of a comparison, as it is when it is saved."""
    drawn = []

    def keep(figure: Any, path: Path) -> Path:
        drawn.append(figure)
        return path

    monkeypatch.setattr(plots, "save_figure", keep)
    monkeypatch.setattr(comparison_plots, "save_figure", keep)
    machine = {"system/cpu_utilization_percentage": 90.0, "system/gpu_0_utilization_percentage": 80.0}
    evaluated = {"val/perplexity": 20.0, "val/bits_per_byte": 1.5, "train/memory_gib": 1.0}
    plots.plot_run(run_records(60, **machine, **evaluated), tmp_path)
    runs = [(f"run {number}", run_records(60)) for number in range(20)]
    comparison_plots.plot_comparison(runs, tmp_path / "comparison.png")
    assert len(drawn) == 5
    return drawn


def test_no_two_curves_of_a_panel_differ_in_their_hue_alone(figures: list[Any]) -> None:
    compared = 0
    for axes in itertools.chain.from_iterable(figure.axes for figure in figures):
        curves = [line for line in axes.lines if len(line.get_xdata()) > 1 and line.get_linewidth() > 0]
        for one, other in itertools.combinations(curves, 2):
            compared += 1
            forms = [(line.get_marker(), line._unscaled_dash_pattern) for line in (one, other)]
            in_grey = lightness_between(to_hex(one.get_color()), to_hex(other.get_color()))
            assert forms[0] != forms[1] or in_grey > GREY_APART
    assert compared > 60


def test_text_can_be_read_on_white() -> None:
    """Labels have the colours of their curves: WCAG asks for a contrast of 3 of what is large or bold."""
    for colour in (BLUE, VERMILION, INK):
        luminance = ((lab(colour)[0] + 16) / 116) ** 3
        assert 1.05 / (luminance + 0.05) > 3
