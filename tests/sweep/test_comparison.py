"""Runs side by side: what differs, in which order, where numbers do not compare, and what seeds allow to say."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import record_run, result_of
from scipy import stats
from test_report import Page

from lmtrain.errors import ConfigError, RunFolderError, UsageError
from lmtrain.run_dir import RunDir
from lmtrain.sweep.comparison import Comparison, compare, doubts, find_runs
from lmtrain.sweep.comparison_report import require_room, write_comparison
from lmtrain.sweep.comparison_view import print_comparison, to_csv, to_json
from lmtrain.sweep.repetition import ONE_SEED, repetition_of
from lmtrain.sweep.statistics import BEST, TIED, UNKNOWN, UNSTABLE, WORSE


def of(folder: Path, metric: str | None = None) -> Comparison:
    return compare(find_runs([folder]), metric)


def rows_of(comparison: Comparison) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(comparison))))


# ------------------------------------------------------------------------------------------------- finding


def test_runs_are_found_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    for place in ("sweep/0000", "sweep/confirm/0000-seed1", "2026-11-22/10-00-00"):
        record_run(tmp_path / place, [3.0])
    for place in ("mlruns/1/artifacts", "2026-11-22/.hidden/copy"):
        record_run(tmp_path / place, [1.0])
    (tmp_path / "2026-11-22/10-00-00/checkpoints").mkdir()
    record_run(tmp_path / "2026-11-22/10-00-00/checkpoints/inner", [1.0])
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text("no: run")
    names = [row.name for row in of(tmp_path).rows]
    assert sorted(names) == ["2026-11-22/10-00-00", "sweep/0000", "sweep/confirm/0000-seed1"]


def test_a_run_named_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record_run(tmp_path / "0000", [3.0])
    record_run(tmp_path / "0001", [2.0])
    (tmp_path / "link").symlink_to(tmp_path / "0001")
    assert len(find_runs([tmp_path / "0001", tmp_path, tmp_path / "link"])) == 2
    assert caplog.text.count("is named twice; it counts once") == 2


def test_what_holds_no_run_is_refused(tmp_path: Path) -> None:
    run = record_run(tmp_path / "run", [3.0])
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "empty", r"there is no run in .*empty: the folder of a run has config\.yaml and metrics\.jsonl"),
        (tmp_path / "missing", "there is no folder"),
        (run / "metrics.jsonl", r"metrics\.jsonl is a file; name the folder of a run"),
    ]:
        with pytest.raises(RunFolderError, match=message):
            find_runs([run, path])


def test_a_damaged_run_is_refused_where_it_was_named_and_left_out_where_it_was_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_run(tmp_path / "good", [3.0])
    torn = record_run(tmp_path / "torn", [3.0])
    (torn / "result.json").write_text("{")
    broken = record_run(tmp_path / "broken", [3.0, 2.0])
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("nonsense\n".join(lines))
    assert [row.name for row in of(tmp_path).rows] == ["good"]
    assert "broken/metrics.jsonl, line 2 is not a metrics record" in caplog.text
    assert "torn/result.json cannot be read" in caplog.text
    for run in (torn, broken):
        with pytest.raises(UsageError):
            find_runs([tmp_path / "good", run])
    (tmp_path / "good/result.json").write_text("")
    with pytest.raises(RunFolderError, match="none of the runs can be read"):
        find_runs([tmp_path])


def test_a_torn_last_line_is_used_up_to_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = record_run(tmp_path / "run", [3.0, 2.0], ended=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "val/loss": 1.')
    (row,) = of(run).rows
    assert (row.status, row.result["step"], row.best_value("val/loss")) == ("died", 20, 2.0)
    assert "the last record is left out" in caplog.text


# ---------------------------------------------------------------------------------------- settings and order


def test_the_settings_that_differ_are_shown_and_no_others(tmp_path: Path) -> None:
    shared = ("trainer.max_steps=20", "batch_size=4")
    record_run(tmp_path / "a", [3.0], *shared, "lr=1e-3", "data.path=here.txt", "tracking=none")
    record_run(tmp_path / "b", [2.0], *shared, "lr=3e-3", "data.path=there.txt", "trainer.log_every=3")
    found = of(tmp_path)
    assert found.keys == ["lr", "trainer.log_every"]
    assert found.settings["b"] == {"lr": 3e-3, "trainer.log_every": 3}
    assert found.shared["batch_size"] == 4


def test_what_the_choice_of_a_group_brings_along_is_not_repeated(tmp_path: Path) -> None:
    record_run(tmp_path / "a", [3.0], "model=nano", "optimizer=adamw")
    record_run(tmp_path / "b", [2.0], "model=tiny", "optimizer=muon")
    record_run(tmp_path / "c", [2.5], "model=tiny", "optimizer=muon", "model.num_layers=3")
    found = of(tmp_path)
    assert found.keys == ["model", "optimizer", "model.num_layers"]
    assert found.settings["b"] == {"model": "tiny", "optimizer": "muon", "model.num_layers": 8}


def test_a_config_of_an_older_version_differs_in_what_it_says_only(tmp_path: Path) -> None:
    record_run(tmp_path / "new", [3.0], "lr=1e-3")
    old = record_run(tmp_path / "old", [2.0], "lr=3e-3")
    lines = (old / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("dropout", "seed", "objective"))]
    (old / "config.yaml").write_text("".join(kept))
    assert of(tmp_path).keys == ["lr"]
    print_comparison(of(tmp_path))


def test_the_best_come_first_and_those_without_an_end_last(tmp_path: Path) -> None:
    record_run(tmp_path / "good", [3.0, 2.5])
    record_run(tmp_path / "better", [3.0, 2.0])
    record_run(tmp_path / "diverged", [1.0], result={"status": "diverged"})
    record_run(tmp_path / "died", [2.8, 2.9], ended=False)
    running = record_run(tmp_path / "running", [], ended=False)
    owner = RunDir(running)
    owner.lock()
    found = of(tmp_path)
    owner.unlock()
    assert [(row.name, row.status) for row in found.rows] == [
        ("better", "completed"),
        ("good", "completed"),
        ("diverged", "diverged"),
        ("died", "died"),
        ("running", "running"),
    ]
    assert found.best is found.rows[0]
    died, going_on = (row for row in rows_of(found)[3:])
    assert (died["objective"], died["val/loss"], died["step"], died["seconds"]) == ("2.8", "2.9", "20", "1.0")
    assert (going_on["objective"], going_on["step"], going_on["status"]) == ("", "", "running")


def test_another_metric_sorts_by_its_last_value(tmp_path: Path) -> None:
    for name, losses, speed in (("a", [2.0, 3.0], 10.0), ("b", [2.5, 2.6], 30.0), ("c", [2.9, 2.9], 20.0)):
        metrics = {"val/loss": losses[-1], "train/tokens_per_second": speed}
        record_run(tmp_path / name, losses, result={"metrics": metrics})
    assert [row.name for row in of(tmp_path).rows] == ["a", "b", "c"], "the best value each reached"
    assert [row.name for row in of(tmp_path, "train/tokens_per_second").rows] == ["b", "c", "a"], "more is better"
    assert rows_of(of(tmp_path, "train/tokens_per_second"))[0]["train/tokens_per_second"] == "30.0"
    with pytest.raises(ConfigError, match=r"no run has a metric val/los; did you mean val/loss\?"):
        of(tmp_path, "val/los")
    with pytest.raises(ConfigError, match="no run has a metric xyz; there are run/parameters"):
        of(tmp_path, "xyz")


def test_runs_of_mixed_objectives_are_compared_by_what_all_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record_run(tmp_path / "a", [3.0])
    record_run(tmp_path / "b", [2.0], result={"objective_name": "train/loss", "objective": 0.5})
    found = of(tmp_path)
    assert (found.metric, [row.name for row in found.rows]) == ("val/bits_per_byte", ["b", "a"])
    assert "different objectives (train/loss, val/loss): compared by val/bits_per_byte" in caplog.text
    record_run(tmp_path / "c", [2.0], result={"metrics": {"train/loss": 1.0}})
    with pytest.raises(ConfigError, match="choose by --metric NAME"):
        of(tmp_path)
    assert [row.name for row in of(tmp_path, "train/loss").rows] == ["c", "b", "a"]


# ---------------------------------------------------------------------------------------------------- doubts


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ({"texts": {"nowhere.txt": "b"}}, "nowhere.txt is not the same text in all runs: they do not compare"),
        ({"texts": {"other.txt": "b"}}, "trained on different texts (nowhere.txt, other.txt)"),
        ({"tokenizer_fingerprint": "words"}, "2 tokenizers, so what they lose a token does not compare"),
        ({"tokens": 640}, "The completed runs saw from 640 to 1,280 tokens"),
        ({"texts": {}, "tokens": 1279}, None),
        ({"tokens": 640, "status": "early_stopped"}, None),
    ],
)
def test_what_does_not_compare_is_said(tmp_path: Path, result: dict[str, Any], told: str | None) -> None:
    record_run(tmp_path / "a", [3.0, 2.0])
    record_run(tmp_path / "b", [3.0, 2.0], result=result)
    said = doubts(of(tmp_path))
    assert len(said) == (told is not None)
    assert told is None or told in said[0]
    if "tokenizer_fingerprint" in result:
        assert doubts(of(tmp_path, "val/bits_per_byte")) == []


# ----------------------------------------------------------------------------------------------------- seeds

NOISE = [0.00, 0.06, -0.04, 0.09, 0.02]


def seeded(folder: Path, lr: float, losses: list[float], first_seed: int = 0, **result: Any) -> None:
    for seed, loss in enumerate(losses, start=first_seed):
        record_run(folder / f"{lr}-{seed}", [loss], f"lr={lr}", f"seed={seed}", result=result)


def test_runs_that_differ_in_their_seed_are_one_setting(tmp_path: Path) -> None:
    best, tied, worse = ([base + noise for noise in NOISE] for base in (2.0, 2.001, 2.1))
    tied[1], tied[3] = tied[3], tied[1]
    worse[0] += 0.01
    seeded(tmp_path, 1e-3, worse)
    seeded(tmp_path, 3e-3, best)
    seeded(tmp_path, 1e-2, tied)
    seeded(tmp_path, 2e-2, [2.5])
    found = repetition_of(of(tmp_path))
    assert found is not None
    assert [setting.label for setting in found.settings] == ["lr 0.003", "lr 0.01", "lr 0.001"]
    assert [judgement.verdict for judgement in found.judgements] == [BEST, TIED, WORSE]
    expected = stats.ttest_rel(worse, best)
    assert found.judgements[2].p_value == pytest.approx(2 * expected.pvalue)  # of two differences, the surer one
    assert found.conclusions()[0].startswith("lr 0.003 has the best mean, val/loss 2.0260 (95 %: ")
    assert "but 1 other is not distinguishable from it" in found.conclusions()[0]


def test_seeds_that_nobody_shares_are_compared_after_welch(tmp_path: Path) -> None:
    ours, best = [2.5, 2.6, 2.55], [2.0, 2.1, 2.04]
    seeded(tmp_path, 1e-3, best)
    seeded(tmp_path, 3e-3, ours, first_seed=10)
    found = repetition_of(of(tmp_path))
    assert found is not None
    assert found.judgements[1].p_value == pytest.approx(stats.ttest_ind(ours, best, equal_var=False).pvalue)
    assert "1 other is worse beyond chance" in found.conclusions()[0]


def test_runs_that_went_wrong_or_were_cut_short(tmp_path: Path) -> None:
    seeded(tmp_path, 1e-3, [2.0, 2.1, 2.05])
    seeded(tmp_path, 3e-3, [1.5, 1.6])
    record_run(tmp_path / "3e-3-9", [1.5], "lr=3e-3", "seed=9", result={"status": "diverged"})
    record_run(tmp_path / "1e-3-9", [9.0], "lr=1e-3", "seed=9", ended=False)
    seeded(tmp_path, 2e-3, [2.2], first_seed=0)
    record_run(tmp_path / "2e-3-9", [2.0], "lr=2e-3", "seed=9", result={"status": "out_of_memory"})
    found = repetition_of(of(tmp_path))
    assert found is not None
    assert found.settings[0].values == {0: 2.0, 1: 2.1, 2: 2.05}, "one that died says nothing"
    assert [judgement.verdict for judgement in found.judgements] == [BEST, UNSTABLE, UNSTABLE]
    assert found.settings[1].mishaps == {9: "diverged"}


def test_where_more_is_better_worse_is_less(tmp_path: Path) -> None:
    for lr, speeds in ((1e-3, [10.0, 11.0, 10.5]), (3e-3, [20.0, 21.0, 20.6])):
        for seed, speed in enumerate(speeds):
            result = {"metrics": {"train/tokens_per_second": speed}}
            record_run(tmp_path / f"{lr}-{seed}", [2.0], f"lr={lr}", f"seed={seed}", result=result)
    found = repetition_of(of(tmp_path, "train/tokens_per_second"))
    assert found is not None
    assert [setting.label for setting in found.settings] == ["lr 0.003", "lr 0.001"]
    assert [judgement.verdict for judgement in found.judgements] == [BEST, WORSE]


def test_other_texts_and_threads(tmp_path: Path) -> None:
    """A number of threads makes no other setting, another text does, though its path is not told."""
    record_run(tmp_path / "a", [2.0], "seed=1", "parallel.num_threads=1")
    record_run(tmp_path / "b", [2.1], "seed=2", "parallel.num_threads=2")
    record_run(tmp_path / "c", [3.0], "seed=3", "data.path=x.txt", result={"data_fingerprint": "other"})
    found = repetition_of(of(tmp_path))
    assert found is not None
    assert [setting.runs for setting in found.settings] == [("a", "b")]
    assert found.judgements[0].verdict == BEST


def test_one_seed_each_is_remarked_upon(tmp_path: Path) -> None:
    seeded(tmp_path, 1e-3, [2.0])
    assert ONE_SEED not in to_json(of(tmp_path))["remarks"], "nothing to tell apart"
    seeded(tmp_path, 3e-3, [2.1])
    assert ONE_SEED in to_json(of(tmp_path))["remarks"]
    seeded(tmp_path, 1e-3, [2.0], first_seed=1)
    told = to_json(of(tmp_path))
    assert ONE_SEED not in told["remarks"]
    assert [one["verdict"] for one in told["settings"]] == [BEST]
    assert UNKNOWN not in json.dumps(told)


# --------------------------------------------------------------------------------------------------- showing


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    seeded(folder, 1e-3, [2.0, 2.1])
    seeded(folder, 3e-3, [2.5, 2.7])
    record_run(folder / "broken", [], "lr=5e-3", ended=False)
    record_run(folder / "<b>&", [9.0], "lr=7e-3", result={"status": "diverged", "objective": None})
    return folder


def test_json_is_strict_and_holds_every_number(mixed: Path) -> None:
    told = json.loads(json.dumps(to_json(of(mixed)), allow_nan=False))
    assert told["metric"] == "val/loss"
    assert [run["value"] for run in told["runs"]] == [2.0, 2.1, 2.5, 2.7, None, None]
    assert told["runs"][0]["settings"] == {"lr": 1e-3, "seed": 0}
    assert told["runs"][0]["metrics"]["val/perplexity"] == pytest.approx(math.exp(2))
    best, worse = told["settings"]
    assert best["interval"]["mean"] == pytest.approx(2.05)
    assert worse["values"] == {"0": 2.5, "1": 2.7}


def test_the_page_needs_nothing_beside_itself_and_shows_every_run(mixed: Path, tmp_path: Path) -> None:
    page, table, *pictures = write_comparison(of(mixed), tmp_path / "to", "<script>")
    shown = Page(page)
    assert shown.images == [path.read_bytes() for path in pictures]
    assert [path.name for path in pictures] == ["comparison.png", "objective.png"]
    assert not shown.fetched
    assert "<script>" in shown.text, "a title is shown as it is"
    rows = [row for row in shown.rows if len(row) == 10]
    assert [row[0] for row in rows] == ["0.001-0", "0.001-1", "0.003-0", "0.003-1", "<b>&", "broken"]
    assert rows[0][1:6] == ["completed", "0.001", "0", "2.0000", "1.0000"]
    assert table.read_text() == to_csv(of(mixed))
    assert "not distinguishable" in shown.text


def test_a_comparison_takes_the_place_of_an_earlier_one_only(mixed: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    write_comparison(of(mixed), to, "first")
    require_room(to)
    write_comparison(of(record_run(tmp_path / "empty", [], ended=False)), to, "second")
    assert not list((to / "plots").iterdir()), "pictures of the earlier one do not stay"
    (to / "study.yaml").touch()
    for taken in (to, mixed, tmp_path / "empty/config.yaml"):
        with pytest.raises(RunFolderError):
            require_room(taken)


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (160, set()),
        (110, set()),
        (80, {"perplexity", "seconds"}),
        (60, {"perplexity", "seconds", "tokens", "step"}),
    ],
)
def test_a_table_leaves_out_numbers_rather_than_break_them(
    mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, left_out: set[str]
) -> None:
    monkeypatch.setattr("lmtrain.sweep.terminal.WIDTH_OF_A_LOG", width)
    print_comparison(of(mixed))
    table = capsys.readouterr().out.partition("settings over their seeds")[0].splitlines()
    assert max(map(len, table)) <= width
    headings = {"run", "lr", "seed", "val/loss", "bits/byte", "perplexity", "step", "tokens", "seconds", "status"}
    assert set(table[2].split()) == headings - left_out
    assert [line.split()[0] for line in table[4:10]] == ["0.001-0", "0.001-1", "0.003-0", "0.003-1", "<b>&", "broken"]


def test_many_settings_that_differ_share_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "a", [2.0], "optimizer=adamw", "lr=1e-3", "dropout=0.1", "model.d_model=64", "batch_size=2")
    record_run(tmp_path / "b", [2.0], "model.num_heads=2", "trainer.max_steps=77", "seed=5", "device=cpu")
    print_comparison(of(tmp_path))
    out = capsys.readouterr().out
    assert max(map(len, out.partition("Each setting")[0].splitlines())) <= 120
    assert "settings" in out.splitlines()[2]
    assert "more" in out


def test_a_grid_ends_in_the_same_files(tmp_path: Path) -> None:
    from lmtrain.config.schema import TrackingConfig
    from lmtrain.sweep.summary import sum_up

    seeded(tmp_path / "grid", 1e-3, [2.0, 2.1])
    assert sum_up(tmp_path / "grid", "val/loss", TrackingConfig(), stopped=False) == "completed"
    assert {"comparison.csv", "report.html", "plots"} <= {path.name for path in (tmp_path / "grid").iterdir()}
    record_run(tmp_path / "grid/0009", [3.0], result={"status": "interrupted"})
    assert sum_up(tmp_path / "grid", "val/loss", TrackingConfig(), stopped=False) == "interrupted"
    (tmp_path / "none").mkdir()
    assert sum_up(tmp_path / "none", "val/loss", TrackingConfig(), stopped=True) == "interrupted"


def test_results_of_other_shapes_do_not_break_a_comparison(tmp_path: Path) -> None:
    run = record_run(tmp_path / "old", [2.0])
    result = result_of([{"step": 1, "tokens": 2, "val/loss": 2.0}])
    for name in ("texts", "objective_name", "objectives", "tokenizer_fingerprint", "overrides", "parameters"):
        del result[name]
    (run / "result.json").write_text(json.dumps(result))
    record_run(tmp_path / "new", [3.0])
    assert [row.name for row in of(tmp_path).rows] == ["old", "new"]
    write_comparison(of(tmp_path), tmp_path / "to", "t")
