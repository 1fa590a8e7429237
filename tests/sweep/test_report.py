"""What a study leaves to be read: the page, the tables, the pictures, and what they must not say."""

from __future__ import annotations

import base64
import csv
import logging
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from studies import begun, end

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import Interrupted
from lmtrain.sweep import report
from lmtrain.sweep.landscape import importances
from lmtrain.sweep.pictures import draw_learning_curves, draw_timeline
from lmtrain.sweep.reading import read_study
from lmtrain.sweep.report import reported, write_report
from lmtrain.sweep.scales import Scale, limits_of, sample_of, typical_limits
from lmtrain.sweep.study import SharedStudy


class Page(HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.fetched: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._cell: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value is not None:
                head, _, content = value.partition(",")
                if head == "data:image/png;base64":
                    self.images.append(base64.b64decode(content, validate=True))
                else:
                    self.fetched.append(value)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self._cell = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            assert self._cell is not None
            self.rows[-1].append(self._cell)
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell += data


def mixed(folder: Path, **changes: Any) -> SharedStudy:
    """Six trials that ended in six ways and four that wait; the fifth is the best."""
    study = begun(folder, **changes)
    end(study, "completed", 5.0, 4.0, 3.5, step=30)
    end(study, "pruned", 4.5)
    end(study, "failed", reason="KeyError: '<b>'")
    end(study, "diverged", 4.0, 40.0)
    end(study, "completed", 4.6, 3.9, 3.25)
    end(study, "out_of_memory", reason="one sequence does not fit")
    return study


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_beside_itself(tmp_path: Path) -> None:
    mixed(tmp_path)
    files = write_report(read_study(tmp_path))
    page = Page(files[0])
    drawn = [path.read_bytes() for path in files if path.suffix == ".png"]
    assert len(drawn) >= 5
    assert page.images == drawn
    assert all(image.startswith(b"\x89PNG") for image in drawn)
    assert not page.fetched
    assert "url(" not in files[0].read_text()


def test_the_page_lists_every_trial_the_best_first(tmp_path: Path) -> None:
    mixed(tmp_path)
    page = Page(write_report(read_study(tmp_path))[0])
    rows = [row for row in page.rows if len(row) == 8]
    assert [row[0] for row in rows] == ["4", "0", "1", "5", "3", "2", "6", "7", "8", "9"]
    assert rows[0][1] == "completed"
    assert rows[0][4:6] == ["3.2500", "30k"]
    assert "KeyError: '<b>'" in [row[-1] for row in rows], "a message is shown as it is, never as part of the page"
    assert "[red]" in page.text


def test_the_page_says_how_to_have_the_best_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with space").mkdir()
    monkeypatch.chdir(tmp_path)
    mixed(tmp_path / "with space")
    text = Page(write_report(read_study(Path("with space")))[0]).text
    assert "python -m lmtrain --config-dir 'with space/0004' --config-name config" in text
    assert "python -m lmtrain sweep export 'with space' --trial 4" in text


def test_what_there_is_not_enough_for_is_left_out_with_the_reason(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "completed", 3.0)
    stale = tmp_path / "plots/importances.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier report")
    text = Page(write_report(read_study(tmp_path))[0]).text
    assert "Importances: left out, takes at least 8 trials, there are 1." in text
    assert not stale.exists()


def test_a_study_without_a_completed_trial_has_a_report_without_a_best(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "failed", reason="KeyError: 1")
    end(study, "pruned", 4.0)
    files = {path.name for path in write_report(read_study(tmp_path))}
    assert {"report.html", "trials.csv"} <= files
    assert not {"best.yaml", "optimization_results.yaml"} & files
    assert "No trial was completed" in Page(tmp_path / "report.html").text


def test_reruns_with_other_seeds_are_part_of_the_report(tmp_path: Path) -> None:
    from lmtrain.sweep.confirmation import Candidate, Confirmation

    mixed(tmp_path)
    candidates = [
        Candidate(
            trial=trial, params={"lr": trial}, study_value=value, values={1: value + 0.1, 2: value + 0.2}, mishaps={}
        )
        for trial, value in [(4, 3.25), (0, 3.5)]
    ]
    told = Confirmation(study="made", objective="val/loss", num_compared=2, candidates=tuple(candidates))
    files = write_report(read_study(tmp_path), told)
    page = Page(files[0])
    assert all(sentence in page.text for sentence in told.conclusions())
    assert (tmp_path / "plots/confirm.png").read_bytes() in page.images
    assert tmp_path / "confirm.csv" in files
    assert "trained once" not in page.text


# ------------------------------------------------------------------------------------------- the tables


def test_trials_csv_holds_every_number_whole(tmp_path: Path) -> None:
    mixed(tmp_path)
    study = read_study(tmp_path)
    write_report(study)
    rows = table_of(tmp_path / "trials.csv")
    assert len(rows) == 10
    for row, trial in zip(rows[:6], study.trials, strict=False):
        assert float(row["optimizer.lr"]) == trial.params["optimizer.lr"]
        assert row["tokenizer"] == trial.params["tokenizer"]
    assert [row["state"] for row in rows[:7]] == [
        *("COMPLETE", "PRUNED", "FAIL", "COMPLETE", "COMPLETE", "PRUNED", "WAITING")
    ]
    assert [row["val/loss"] for row in rows[:7]] == ["3.5", "4.5", "", "40.0", "3.25", "", ""]
    assert (rows[0]["tokens"], rows[0]["step"], rows[0]["folder"]) == ("30000", "30", "0000")
    assert rows[2]["reason"] == "KeyError: '<b>'"
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", rows[0]["ended"])
    assert rows[0]["workers"].endswith(":0")


def as_upstream(content: dict[str, Any], folder: Path) -> str:
    """What hydra-optuna-sweeper writes at the end of its `sweep`."""
    OmegaConf.save(OmegaConf.create(content), folder / "upstream.yaml")
    return (folder / "upstream.yaml").read_text()


def test_results_are_written_as_hydras_own_sweeper_does(tmp_path: Path) -> None:
    study = mixed(tmp_path)
    write_report(read_study(tmp_path))
    best = min((t for t in study.trials() if t.state.name == "COMPLETE"), key=lambda trial: trial.value or math.inf)
    expected = {"name": "optuna", "best_params": best.params, "best_value": best.value}
    assert (tmp_path / "optimization_results.yaml").read_text() == as_upstream(expected, tmp_path)
    told = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert told["trial"] == 4
    assert told["values"] == {"val/loss": 3.25}
    assert told["params"] == best.params
    assert told["folder"] == "0004"
    assert told["overrides"] == [f"{name}={value}" for name, value in best.params.items()]


def test_several_objectives_have_a_front(tmp_path: Path) -> None:
    objectives = {"objectives": ("val/loss", "train/tokens_per_second"), "directions": ("minimize", "maximize")}
    study = begun(tmp_path, **objectives)
    for scores in [(3.0, 1000.0), (4.0, 3000.0), (4.5, 2000.0)]:
        end(study, "completed", *scores)
    files = write_report(read_study(tmp_path))
    assert tmp_path / "plots/pareto.png" in files
    front = yaml.safe_load((tmp_path / "best.yaml").read_text())["pareto"]
    assert [(trial["trial"], list(trial["values"].values())) for trial in front] == [
        (0, [3.0, 1000.0]),
        (1, [4.0, 3000.0]),
    ]
    solutions = [{"params": t.params, "values": t.values} for t in study.study.best_trials]
    expected = as_upstream({"name": "optuna", "solutions": solutions}, tmp_path)
    assert (tmp_path / "optimization_results.yaml").read_text() == expected
    rows = table_of(tmp_path / "trials.csv")
    assert [row["train/tokens_per_second"] for row in rows[:3]] == ["1000.0", "3000.0", "2000.0"]


# ------------------------------------------------------------------------------------------- the pictures


def test_where_few_trials_were_completed_they_compare_at_equal_tokens(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "completed", 5.0, 4.0, 3.0)
    for score in range(9):
        end(study, "pruned", 5.1 + score / 10, *([4.1 + score / 10] if score < 7 else []))
    sample = sample_of(read_study(tmp_path))
    assert [trial.number for trial in sample.trials] == list(range(8))
    assert sample.values[:2] == [4.0, 4.1]
    assert sample.note == "as they were after 20k tokens: 8 trials came so far, 1 to the end"


def test_enough_completed_trials_compare_by_their_results(tmp_path: Path) -> None:
    study = begun(tmp_path)
    for score in range(8):
        end(study, "completed", 5.0, 4.0 - score / 10)
    end(study, "pruned", 1.0)
    sample = sample_of(read_study(tmp_path))
    assert not sample.note
    assert sample.values == pytest.approx([3.3, 3.4, 3.5, 3.6, 3.7, 3.8, 3.9, 4.0])


def test_importances_find_the_setting_that_matters(tmp_path: Path) -> None:
    study = begun(tmp_path, num_trials=24)
    while (trial := study.claim()) is not None:
        end(study, "completed", 3 + abs(math.log10(trial.params["optimizer.lr"]) + 2), trial=trial)
    shares = importances(read_study(tmp_path))
    assert next(iter(shares)) == "optimizer.lr"
    assert shares["optimizer.lr"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)


def test_a_setting_stands_where_its_range_has_it() -> None:
    rate = Scale("lr", FloatDistribution(1e-3, 1e-1, log=True))
    assert [rate.place(value) for value in (1e-3, 1e-2, 1e-1)] == pytest.approx([0, 0.5, 1])
    assert [label for _, label in rate.ticks()] == ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1"]
    sizes = Scale("batch_size", CategoricalDistribution([16, 4, 8]))
    assert sizes.ticks() == [(0, "4"), (0.5, "8"), (1, "16")]
    words = Scale("model", CategoricalDistribution(["tiny", "nano"]))
    assert words.ticks() == [(0, "tiny"), (1, "nano")]
    assert not words.is_ordered
    assert Scale("layers", IntDistribution(1, 3)).ticks() == [(0, "1"), (0.5, "2"), (1, "3")]


def test_a_runaway_value_does_not_squeeze_the_rest_flat(tmp_path: Path) -> None:
    low, high = typical_limits([3.0, 3.1, 3.2, 3.3, 1e6], "minimize")
    assert low < 3.0
    assert high < 5
    low, high = typical_limits([-1e6, 3.0, 3.1, 3.2, 3.3], "maximize")
    assert low > 1
    assert high > 3.3
    mixed(tmp_path)
    assert limits_of(read_study(tmp_path))[1] < 10


def test_learning_curves_are_read_from_the_run_folders(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "completed", 5.0, 3.0)
    end(study, "pruned", 4.5)
    (tmp_path / "0000").mkdir()
    lines = ('{"step": 10, "tokens": 640, "train/loss": 5.5}', '{"step": 20, "tokens": 1280, "val/loss": 4.25}')
    (tmp_path / "0000/metrics.jsonl").write_text("\n".join(lines) + "\n")
    figure = draw_learning_curves(read_study(tmp_path))
    assert not isinstance(figure, str)
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()]
    assert curves == [([1280], [4.25]), ([10_000], [4.5])], "what is not here is told by the study"


def attempt(host: str, worker: int, begun: float, seconds: float) -> dict[str, Any]:
    return {"host": host, "worker": worker, "begun": begun, "ended": begun + seconds}


def test_the_timeline_shows_workers_and_cuts_pauses(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "completed", 3.0)
    end(study, "pruned", 4.0)
    read = read_study(tmp_path)
    night = 1e6 + 40_000
    attempts = [
        [attempt("a", 0, 1e6, 60), attempt("a", 1, night, 30)],
        [attempt("b", 0, night, 40)],
    ]
    for trial, its in zip(read.trials, attempts, strict=False):
        trial.user_attrs["attempts"] = its
    figure = draw_timeline(read)
    assert not isinstance(figure, str)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a · 0", "a · 1", "b · 0"]
    bars = [(round(p.get_x()), round(p.get_x() + p.get_width()), p.get_hatch()) for p in axes.patches]
    assert bars == [(0, 60, "///"), (60, 90, None), (60, 100, None)]


# ------------------------------------------------------------------------------------------- at the end of a study


@pytest.mark.parametrize("error", [Interrupted("stopped by SIGINT", 2), KeyError("a bug")])
def test_a_study_that_ends_early_has_its_report_too(tmp_path: Path, error: Exception) -> None:
    study = mixed(tmp_path)
    with pytest.raises(type(error)), reported(study.plan, TrackingConfig()):
        raise error
    assert "The study has not ended: 4 trials to go" in Page(tmp_path / "report.html").text


def test_a_study_in_which_nothing_ended_has_no_report(tmp_path: Path) -> None:
    with reported(begun(tmp_path).plan, TrackingConfig()):
        pass
    assert not (tmp_path / "report.html").exists()


def test_a_report_that_fails_does_not_hide_how_the_study_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(report, "draw_study", fail)
    study = mixed(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(Interrupted), reported(study.plan, TrackingConfig()):
        raise Interrupted("stopped by SIGINT", 2)
    assert "the report cannot be written" in caplog.text
    assert "no space left" in caplog.text
