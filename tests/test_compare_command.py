"""`lmtrain compare` as it is typed: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import CommandLine, snapshot
from recorded_runs import record_run

from lmtrain.commands.compare import main
from lmtrain.errors import UsageError


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two learning rates with two seeds each, in `runs`."""
    monkeypatch.chdir(tmp_path)
    for number, (lr, seed, loss) in enumerate([(1e-3, 0, 3.1), (1e-3, 1, 3.2), (3e-3, 0, 2.5), (3e-3, 1, 2.7)]):
        record_run(tmp_path / f"runs/{number:04d}", [4.0, loss], f"lr={lr}", f"seed={seed}")
    return tmp_path / "runs"


def test_a_table_of_runs_and_one_of_settings(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(runs)
    assert main(["runs"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines if line and line[0].startswith("000")] == ["0002", "0003", "0000", "0001"]
    assert ["0002", "0.003", "0", "2.5000", "1.2500", "12.18", "20", "1,280", "12.5", "completed"] in lines
    assert "4 runs by val/loss" in out
    assert "2 settings over their seeds: val/loss, 95 % intervals" in out
    assert "has the best mean, val/loss 2.6000 (95 %: 1.3294 … 3.8706) over 2 seeds" in out
    assert "--to FOLDER" in out
    assert snapshot(runs) == before, "without --to nothing is written"


def test_a_page_a_table_and_pictures_where_asked_for(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs/0000", "runs/0002", "--to", "new/page"]) == 0
    assert "written to new/page: open new/page/report.html" in capsys.readouterr().out
    written = sorted(str(path.relative_to("new/page")) for path in Path("new/page").rglob("*") if path.is_file())
    assert written == ["comparison.csv", "plots/comparison.png", "plots/objective.png", "report.html"]
    assert main(["runs", "--to", "new/page"]) == 0, "over an earlier one"


def test_json_for_programs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--json", "--metric", "val/perplexity"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["metric"], [run["run"] for run in told["runs"]]) == (
        "val/perplexity",
        ["0002", "0003", "0000", "0001"],
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN; lmtrain compare --help"),
        (["nowhere"], "there is no folder nowhere"),
        (["runs/0000/result.json"], "is a file; name the folder of a run"),
        (["empty"], "there is no run in empty"),
        (["runs", "--metric", "val/los"], "no run has a metric val/los; did you mean val/loss?"),
        (["runs", "--to", "runs"], "runs holds something else than a comparison: name a new folder"),
        (["runs", "--to", "runs/0000/config.yaml"], "is a file: name a new folder"),
        (["runs", "--to", "runs/0000/config.yaml/page"], "cannot write"),
    ],
)
def test_wrong_requests_leave_nothing_behind(runs: Path, words: list[str], message: str) -> None:
    Path("empty").mkdir()
    before = snapshot(Path.cwd())
    with pytest.raises(UsageError, match=message.replace("?", r"\?")) as told:
        main(words)
    assert len(str(told.value).splitlines()) <= 2
    assert snapshot(Path.cwd()) == before


def test_the_real_command(lmtrain: CommandLine) -> None:
    record_run(lmtrain.folder / "runs/a", [3.0])
    with (record_run(lmtrain.folder / "runs/b", [2.0]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "to')
    done = lmtrain("compare", "runs")
    assert "2 runs by val/loss" in done.stdout
    assert done.stderr.strip() == "runs/b/metrics.jsonl ends in the middle of a line; the last record is left out"
    refused = lmtrain("compare", "runs/c", "runs", status=2)
    assert (refused.stdout, refused.stderr) == ("", "lmtrain: there is no folder runs/c\n")
    assert "lmtrain compare RUN RUN…" in lmtrain("compare", "--help").stdout
