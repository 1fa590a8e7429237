"""`lmtrain sweep status`, and the reading of a study it rests on: whole, from anywhere, without a trace."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import yaml
from command_line import CommandLine, snapshot
from optuna.trial import TrialState
from studies import begun, end, plan_in

from lmtrain.commands import load_command
from lmtrain.errors import ConfigError, LmtrainError, RunFolderError
from lmtrain.sweep import view
from lmtrain.sweep.reading import ReadStudy, StudyReader, read_description, read_study, write_description
from lmtrain.sweep.study import SharedStudy


def status(*words: object) -> None:
    assert load_command("sweep")(["status", *map(str, words)]) == 0


def kill_worker_of(study: SharedStudy, number: int) -> None:
    """As if the machine had been started again since the trial was claimed."""
    storage = study.study._storage
    trial = study.trials()[number]
    storage.set_trial_user_attr(trial._trial_id, "lease", trial.user_attrs["lease"] | {"boot": "an earlier one"})


def test_a_sweep_folder_says_what_its_study_is(tmp_path: Path) -> None:
    begun(tmp_path)
    assert yaml.safe_load((tmp_path / "study.yaml").read_text()) == {
        "name": "made",
        "storage": "study.journal",
        "objectives": ["val/loss"],
        "directions": ["minimize"],
        "num_trials": 10,
        "budget_tokens": 100_000,
        "space": {"optimizer.lr": "0.0001 … 0.1 (log)", "tokenizer": "byte | [red]"},
    }


def test_status_shows_what_runs_and_what_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = begun(tmp_path)
    end(study, "completed", 3.0)
    study.claim(worker=5)
    before = snapshot(tmp_path)
    status(tmp_path)
    assert snapshot(tmp_path) == before, "to look leaves no trace"
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["made", "·", "100k", "tokens", "a", "trial"]
    assert lines[3][:2] == ["1", "5"], "trial and worker"
    assert lines[4] == ["made:", "1", "trial", "by", "val/loss"]
    assert lines[7][:2] == ["0", "completed"]
    assert " ".join(lines[-2]).startswith("1 of 10 done: 1 completed · best 3.0000 (trial 0) · about")
    assert lines[-1] == ["sweep", "folder", str(tmp_path)]


def test_a_trial_whose_worker_died_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = begun(tmp_path)
    study.claim()
    assert read_study(tmp_path).counts["running"] == 1
    kill_worker_of(study, 0)
    assert read_study(tmp_path).counts["waiting"] == 10
    status(tmp_path)
    assert capsys.readouterr().out.splitlines()[0] == "0 of 10 done · nobody works on it; the same command goes on"


def test_a_folder_may_be_moved(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    end(begun(tmp_path / "here"), "completed", 3.0)
    shutil.move(tmp_path / "here", tmp_path / "there")
    study = read_study(tmp_path / "there")
    assert study.best is not None
    assert study.folder_of(study.best) == tmp_path / "there/0000"


def test_trials_a_shorter_plan_leaves_out_are_not_missing(tmp_path: Path) -> None:
    study = begun(tmp_path)
    for _ in range(3):
        end(study, "completed", 3.0)
    write_description(plan_in(tmp_path, num_trials=2))
    read = read_study(tmp_path)
    assert [trial.state for trial in read.trials] == [TrialState.COMPLETE] * 3, "what was done stays"
    assert read.is_over


def test_trials_of_an_earlier_study_are_kept_apart(tmp_path: Path) -> None:
    for name in ("early", "late"):
        (tmp_path / name).mkdir()
    early = begun(tmp_path / "early", name="early", num_trials=2)
    end(early, "completed", 3.0)
    end(early, "pruned", 4.0)
    late = SharedStudy(plan_in(tmp_path / "late", num_trials=3))
    late.add_missing(early.trials())
    write_description(late.plan)
    end(late, "completed", 5.0)
    read = read_study(tmp_path / "late")
    assert [trial.number for trial in read.imported] == [0, 1]
    assert [trial.number for trial in read.trials] == [2, 3, 4]
    assert read.best is not None
    assert read.best.number == 2


def test_a_password_is_asked_for_and_never_written(tmp_path: Path) -> None:
    write_description(plan_in(tmp_path, storage="postgresql://me:secret@127.0.0.1:9/db"))
    assert "secret" not in (tmp_path / "study.yaml").read_text()
    with pytest.raises(ConfigError, match=r"postgresql://me:\*\*\*@127.0.0.1:9/db needs its password: add --storage"):
        status(tmp_path)


@pytest.mark.parametrize("storage", ["sqlite:///{}/elsewhere.db", "{}/elsewhere.journal"])
def test_a_storage_that_is_not_there_is_not_made(tmp_path: Path, storage: str) -> None:
    begun(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"elsewhere.* is not there"):
        status(tmp_path, "--storage", storage.format(tmp_path))
    assert snapshot(tmp_path) == before


def test_a_storage_without_the_study_is_told(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        begun(tmp_path / name, name=name, storage=f"sqlite:///{tmp_path}/{name}.db")
    assert read_study(tmp_path / "one").name == "one"
    with pytest.raises(ConfigError, match=r"other\.db holds no study one"):
        status(tmp_path / "one", "--storage", f"sqlite:///{tmp_path}/other.db")


@pytest.mark.parametrize("content", ["name: [", "name: x", "- a list", "{name: a, surprise: 1}", ""])
def test_a_damaged_description_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(RunFolderError, match=r"study\.yaml cannot be read"):
        read_description(tmp_path)


def test_wrong_words_answer_in_a_line(lmtrain: CommandLine) -> None:
    wrong = lmtrain("sweep", "status", "nowhere", status=2)
    assert wrong.stderr == "lmtrain: nowhere is not the folder of a study: it has no study.yaml\n"
    assert list(lmtrain.folder.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["status"], ["nonsense", "x"], ["status", "x", "--nonsense"]])
def test_words_that_are_none_are_refused(words: list[str]) -> None:
    with pytest.raises(LmtrainError, match="--help tells what it takes"):
        load_command("sweep")(words)


def test_watch_ends_with_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(view, "POLL_SECONDS", 0.02)
    study = begun(tmp_path, num_trials=2)
    end(study, "pruned", 4.0)
    looked = threading.Event()
    read = StudyReader.read

    def read_and_say(reader: StudyReader) -> ReadStudy:
        now = read(reader)
        looked.set()
        return now

    monkeypatch.setattr(StudyReader, "read", read_and_say)
    watching = threading.Thread(target=status, args=(tmp_path, "--watch"))
    watching.start()
    assert looked.wait(10)
    end(study, "completed", 3.0)
    watching.join(10)
    assert not watching.is_alive()
    captured = capsys.readouterr()
    assert [line.split(" · ")[0].split(" (")[0] for line in captured.err.splitlines()][-1] == (
        "trial 1 completed at 10k tokens, val/loss 3.0000"
    )
    assert "2 of 2 done: 1 completed, 1 pruned" in captured.out


def test_a_study_is_read_as_a_table(tmp_path: Path) -> None:
    study = begun(tmp_path)
    end(study, "completed", 3.0)
    end(study, "pruned", 4.0, 3.5)
    end(study, "failed")
    end(study, "completed", 2.0)
    read = read_study(str(tmp_path))
    table = read.trials_frame
    assert list(table.columns) == ["status", "optimizer.lr", "tokenizer", "val/loss", "tokens", "seconds", "folder"]
    assert table.index.tolist() == list(range(10))
    assert table["status"].tolist()[:5] == ["completed", "pruned", "failed", "completed", "waiting"]
    assert table["val/loss"].tolist()[:2] == [3.0, 3.5]
    assert table["val/loss"].isna().tolist()[2:5] == [True, False, True]
    assert table["tokens"].tolist()[:2] == [10_000, 20_000]
    assert table["folder"][3] == str(tmp_path / "0003")
    assert read.best_params == dict(read.trials[3].params) == table.loc[3, ["optimizer.lr", "tokenizer"]].to_dict()
    assert read.importances == {}, "too few trials"
    assert repr(read).startswith("<study made: 4 of 10 done: 2 completed, 1 pruned, 1 failed · best 2.0000 (trial 3)")


def test_a_study_that_has_not_begun_is_an_empty_table(tmp_path: Path) -> None:
    begun(tmp_path, num_trials=0)
    read = read_study(tmp_path)
    assert read.trials_frame.shape == (0, 7)
    assert read.best_params == {}
