"""Pictures: the right files are written, and no record of a real run breaks them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmtrain.tracking import plots
from lmtrain.tracking.comparison_plots import plot_comparison, plot_objective
from lmtrain.tracking.histograms import Histogram, append_histograms
from lmtrain.tracking.plots import plot_run


def run_records(num: int = 30, **extra: float) -> list[dict[str, float]]:
    records = []
    for step in range(1, num + 1):
        record: dict[str, float] = {"step": step, "tokens": step * 64, "time": float(step), "attempt": 0}
        record |= {"train/loss": 5 / step, "train/lr": 1e-3, "train/grad_norm": 1.0}
        record |= {"train/tokens_per_second": 20_000.0}
        if step % 10 == 0:
            record["val/loss"] = 6 / step
        records.append(record | extra)
    return records


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_plot_run_writes_loss_and_training(tmp_path: Path) -> None:
    written = plot_run(run_records(), tmp_path / "plots")
    assert [path.name for path in written] == ["loss.png", "evaluation.png", "training.png"]
    assert all(is_png(path) for path in written)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    "records",
    [
        run_records(1),
        run_records(5),
        run_records(30, **{"train/grad_norm": math.inf}),
        [*run_records(20), {"step": 21, "tokens": 21 * 64, "train/loss": math.nan, "train/grad_norm": 1e6}],
        [{"step": 0, "tokens": 0, "val/loss": 8.0}],
    ],
    ids=["one", "few", "infinite", "diverged", "start"],
)
def test_plot_run_bears_short_and_broken_runs(tmp_path: Path, records: list[dict[str, float]]) -> None:
    assert (tmp_path / "loss.png") in plot_run(records, tmp_path)


def test_everything_measured_is_drawn(tmp_path: Path) -> None:
    machine = {"system/cpu_utilization_percentage": 90.0, "system/network_receive_megabytes": 1.0}
    written = plot_run(run_records(**machine, **{"train/memory_gib": 1.0, "train/mfu": 0.4}), tmp_path)
    assert [path.name for path in written] == ["loss.png", "evaluation.png", "training.png", "system.png"]


def axes_of(draw: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of what is drawn, with all their ticks in place."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or path)
    draw()
    for figure in figures:
        figure.canvas.draw()
    return [axes for figure in figures for axes in figure.axes]


def test_tokens_are_shown_above_the_steps_also_where_batches_grew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[dict[str, float]] = []
    for step in range(1, 101):
        tokens = 10 * step if step <= 50 else 500 + 40 * (step - 50)
        records.append({"step": step, "tokens": tokens, "train/loss": 3.0, "attempt": 0})
    (axes,) = axes_of(lambda: plot_run(records, tmp_path), monkeypatch)
    (above,) = axes.child_axes
    to_tokens = above._functions[0]
    assert [float(to_tokens(step)) for step in (0, 25, 50, 75, 100)] == [0, 250, 500, 1500, 2500]
    assert float(above._functions[1](1500.0)) == 75
    assert float(to_tokens(110)) == 2750, "beyond the records as on average"


def test_a_resumed_run_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [one | {"attempt": int(one["step"] > 20)} for one in run_records()]
    panels = axes_of(lambda: plot_run(records, tmp_path), monkeypatch)
    marks = [[line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1] for axes in panels]
    assert marks == [[20]] * len(panels)


def test_evaluations_without_bits_per_byte_have_no_such_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"step": 10, "tokens": 640, "val/loss": 2.0, "val/perplexity": 7.4}]
    panels = axes_of(lambda: plot_run(records, tmp_path), monkeypatch)
    assert [axes.get_ylabel() for axes in panels] == ["loss (nats a token)", "loss\n(nats a token)", "perplexity"]


def test_a_long_run_is_drawn_in_no_time(tmp_path: Path) -> None:
    records = [{"step": step, "tokens": step, "train/loss": 2 + 1 / step, "attempt": 0} for step in range(1, 100_001)]
    began = time.process_time()
    plot_run(records, tmp_path)
    assert time.process_time() - began < 10  # 1.3 s alone; a median of each point's surroundings takes minutes


def test_nothing_to_draw_writes_nothing(tmp_path: Path) -> None:
    assert plot_run([], tmp_path) == []
    assert plot_comparison([("a", [])], tmp_path / "c.png") is None
    assert plot_objective([({"lr": 1e-3}, math.nan)], "val/loss", tmp_path / "o.png") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num", [1, 2, 20])
def test_plot_comparison(tmp_path: Path, num: int) -> None:
    runs = [(f"lr={i}", run_records()) for i in range(num)]
    path = plot_comparison([*runs, ("failed", []), ("one", run_records(1))], tmp_path / "comparison.png")
    assert path is not None
    assert is_png(path)


def test_plot_comparison_falls_back_to_the_training_loss(tmp_path: Path) -> None:
    path = plot_comparison([("a", run_records(5))], tmp_path / "comparison.png")
    assert path is not None


def test_plot_objective_takes_numbers_words_and_missing_keys(tmp_path: Path) -> None:
    points = [
        ({"lr": 1e-4, "optimizer": "adamw", "compile": True}, 2.0),
        ({"lr": 1e-3, "optimizer": "muon", "compile": False}, 1.5),
        ({"lr": 1e-2, "optimizer": "muon"}, math.inf),
        ({"lr": 3e-4, "dropout": 0.0}, 1.8),
    ]
    path = plot_objective(points, "val/loss", tmp_path / "objective.png")
    assert path is not None
    assert is_png(path)


def test_words_and_numbers_too_many_to_name_are_drawn_all_the_same(tmp_path: Path) -> None:
    points: list[tuple[dict[str, Any], float]] = [
        ({"word": f"a/long/path/of/a/file/{number}", "number": number**2, "same": 1}, float(number))
        for number in range(60)
    ]
    assert plot_objective(points, "train/tokens_per_second", tmp_path / "objective.png", highest=True) is not None


def diagnosed(num_steps: int, num_layers: int) -> list[dict[str, float]]:
    return [
        {"step": step, "tokens": step, f"diagnostics/{kind}/block_{layer:02d}": 0.0 if step == 2 else 1 / (1 + layer)}
        for step in range(1, num_steps + 1)
        for kind in ("grad_norm", "weight_norm", "update_ratio")
        for layer in range(num_layers)
    ]


@pytest.mark.parametrize(("num_steps", "num_layers"), [(1, 1), (3, 4), (20, 60)])
def test_diagnostics_are_drawn_for_models_of_any_depth(tmp_path: Path, num_steps: int, num_layers: int) -> None:
    for step in range(1, num_steps + 1):
        layers = {f"block_{i:02d}": Histogram(-1.0, 1.0, [step, 0, 3]) for i in range(num_layers)}
        append_histograms(tmp_path / "histograms.jsonl", step, layers)
    written = plot_run([*run_records(), *diagnosed(num_steps, num_layers)], tmp_path, tmp_path / "histograms.jsonl")
    names = ["loss.png", "evaluation.png", "training.png", "gradient_flow.png", "parameter_histograms.png"]
    assert [path.name for path in written] == names
    assert all(is_png(path) for path in written)


def test_a_gradient_norm_that_is_not_finite_does_not_break_the_picture(tmp_path: Path) -> None:
    broken = {"step": 1, "tokens": 1, "diagnostics/grad_norm/block_0": math.nan, "diagnostics/grad_norm/block_1": 1.0}
    assert tmp_path / "gradient_flow.png" in plot_run([broken], tmp_path)
