"""`lmtrain models`, and the commands that take a stored model, typed as users type them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from command_line import TINY, CommandLine, snapshot
from full_disk import FullDisk, on_a_small_disk
from stored_models import BUDGET, train
from trained_runs import make_run

from lmtrain.commands import data, evaluate, export, generate, models
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.errors import ConfigError, LmtrainError, ModelStoreError, RunError
from lmtrain.run_dir import RunDir
from lmtrain.store.folder import FolderStore
from lmtrain.tracking.metrics_file import read_metrics

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A working folder with a trained run in `run`."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, corpus)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test's own with that run; this process is in it."""
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMTRAIN_MODELS", raising=False)
    monkeypatch.setenv("LMTRAIN_CACHE", str(trained / "cache"))
    return tmp_path


def said(capsys: Capture, *words: str) -> str:
    """What `lmtrain models` prints."""
    assert models.main(list(words)) == 0
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the verbs


def test_versions_are_numbered_listed_shown_verified_and_deleted(here: Path, capsys: Capture) -> None:
    assert said(capsys, "list") == "no models in models; lmtrain models save RUN --name NAME keeps one\n"
    assert said(capsys, "save", "run", "--name", "tale").startswith("tale:1: step ")
    assert said(capsys, "save", "run", "--name", "tale", "--checkpoint", "15", "--weights-only").startswith("tale:2: ")
    assert said(capsys, "save", "tale:2", "--name", "other.one", "--weights-only").startswith("other.one:1: step 15")
    table = said(capsys, "list")
    result = RunDir(here / "run").read_result()
    assert result is not None
    row = next(line for line in table.splitlines() if line.split()[:2] == ["tale", "1"])
    assert row.split()[2] == f"{result['parameters']:,}"
    assert f"val/loss {result['objective']:.4f}" in row
    assert "input.txt" in table
    assert [line["version"] for line in json.loads(said(capsys, "list", "tale", "--json"))] == [1, 2]
    shown = said(capsys, "show", "tale:1")
    assert f"{result['parameters']:,}" in shown
    assert json.loads(said(capsys, "show", "tale", "--json"))["version"] == 2  # the newest
    assert said(capsys, "verify") == "".join(f"{id}  as it was saved\n" for id in ("other.one:1", "tale:1", "tale:2"))
    assert said(capsys, "delete", "tale:1", "--yes") == "deleted tale:1 from models\n"
    assert said(capsys, "save", "run", "--name", "tale").startswith("tale:3: ")  # no number is given twice
    said(capsys, "delete", "other.one", "--yes")
    assert sorted(path.name for path in (here / "models").iterdir()) == [".lock", "tale"]


def test_the_metadata_is_readable_and_says_what_was_trained(here: Path, corpus: Path, capsys: Capture) -> None:
    said(capsys, "save", "run", "--name", "tale", "--checkpoint", "15")
    text = (here / "models/tale/1/model.json").read_text()
    assert text.count("\n") > 40
    metadata, result = json.loads(text), json.loads((here / "run/result.json").read_text())
    at_15 = [record for record in read_metrics(here / "run/metrics.jsonl") if record["step"] == 15]
    assert metadata["step"] == 15
    assert metadata["tokens"] == at_15[-1]["tokens"]
    assert metadata["objective"] == {"name": "val/loss", "value": metadata["metrics"]["val/loss"]}
    assert metadata["metrics"]["val/loss"] in [record.get("val/loss") for record in at_15]
    assert metadata["parameters"] == result["parameters"]
    assert metadata["data"] == {"name": str(corpus), "fingerprint": result["data_fingerprint"]}
    assert metadata["tokenizer"]["fingerprint"] == result["tokenizer_fingerprint"]
    assert metadata["architecture"]["d_model"] == 16
    assert metadata["run"] == "run"
    assert metadata["libraries"] == result["environment"]["libraries"]
    entry = here / "models/tale/1"
    files = {str(path.relative_to(entry)) for path in entry.rglob("*") if path.is_file()} - {"model.json"}
    assert set(metadata["files"]) == files
    assert metadata["bytes"] == sum((entry / name).stat().st_size for name in files)


def test_the_best_checkpoint_is_kept_unless_another_is_named(here: Path, capsys: Capture) -> None:
    best = (here / "run/checkpoints/best").readlink().name
    (here / "run/checkpoints/best").unlink()
    (here / "run/checkpoints/best").symlink_to("step_00000015")
    for words, step in (([], 15), (["--checkpoint", "last"], 20), (["--checkpoint", "10"], 10)):
        assert f": step {step}, " in said(capsys, "save", "run", "--name", "tale", *words)
    assert best == "step_00000020"
    [kept] = (here / "models/tale/1/checkpoints").iterdir()
    run = here / "run/checkpoints/step_00000015"
    for name in ("model.safetensors", "training_state.safetensors"):
        assert (kept / name).read_bytes() == (run / name).read_bytes()


def test_passwords_in_addresses_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", ByteTokenizer(), "tracking=mlflow", "tracking.uri=http://me:secret@server")
    FolderStore(Path("models")).save(Path("run"), "tale")
    assert "secret" in (tmp_path / "run/config.yaml").read_text()
    for path in (tmp_path / "models").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes()


def answered(asked: list[str], answer: str, question: str) -> str:
    asked.append(question)
    return answer


def test_delete_asks_on_a_terminal(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    said(capsys, "save", "run", "--name", "tale")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    asked: list[str] = []
    for answer, there in (("n", True), ("", True), ("y", False)):
        monkeypatch.setattr("builtins.input", partial(answered, asked, answer))
        models.main(["delete", "tale"])
        assert (here / "models/tale/1").exists() is there
    assert asked == ["delete tale:1 from models? [y/N] "] * 3


@pytest.mark.parametrize("how", ["option", "environment"])
def test_the_store_is_any_folder(how: str, here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--store", "elsewhere/store"] if how == "option" else []
    if how == "environment":
        monkeypatch.setenv("LMTRAIN_MODELS", "elsewhere/store")
    said(capsys, "save", "run", "--name", "tale", *words)
    assert (here / "elsewhere/store/tale/1/model.json").exists()
    assert said(capsys, "verify", *words) == "tale:1  as it was saved\n"
    assert not (here / "models").exists()


# ------------------------------------------------------------------------------------------- where models are taken


def test_stored_models_are_taken_where_run_folders_are(here: Path, capsys: Capture) -> None:
    said(capsys, "save", "run", "--name", "tale", "--checkpoint", "last")
    prompt = ["--prompt", "the cat", "--max-new-tokens", "9"]
    answers = []
    for run in ("run", "tale", "tale:1", "models/tale/1"):
        assert generate.main([run, *prompt, "--checkpoint", "last"]) == 0
        assert evaluate.main([run, "--json", "--checkpoint", "last"]) == 0
        texts = capsys.readouterr().out
        answers.append(texts.replace(json.dumps("run"), "").replace('"models/tale/1"', ""))
    assert len(set(answers)) == 1
    with pytest.raises(ConfigError, match="models/tale/1 cannot be exported: the Llama format has no"):
        export.main(["tale", "--to", "exported"])
    assert export.main(["tale", "--to", "exported", "--format", "mlflow"]) == 0
    assert data.main(["inspect", "tale:1", "--samples", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_of_that_path_wins_over_a_model_of_that_name(here: Path, capsys: Capture) -> None:
    said(capsys, "save", "run", "--name", "run", "--checkpoint", "10")
    evaluate.main(["run", "--json"])
    assert json.loads(capsys.readouterr().out)["run"] == "run"
    (here / "run").rename(here / "renamed")
    evaluate.main(["run", "--json"])
    assert json.loads(capsys.readouterr().out)["step"] == 10


def test_training_starts_from_a_version_of_a_stored_model(lmtrain: CommandLine, here: Path, corpus: Path) -> None:
    lmtrain("models", "save", "run", "--name", "tale", "--store", "kept")
    words = [*TINY, f"data.path={corpus}", *BUDGET, "init_from=tale", "hydra.run.dir=next"]
    before = snapshot(here / "kept/tale/1")
    lmtrain(*words, LMTRAIN_MODELS="kept")
    assert "init_from: tale:1\n" in (here / "next/config.yaml").read_text()
    begun, ended = (
        [record["val/loss"] for record in read_metrics(here / run / "metrics.jsonl") if "val/loss" in record]
        for run in ("next", "run")
    )
    assert begun[0] < ended[0]
    lmtrain("models", "save", "run", "--name", "tale", "--store", "kept")
    lmtrain(*words, "model_store=kept", "resume=auto", "trainer.max_steps=25")  # typed again: it is the same run
    result = json.loads((here / "next/result.json").read_text())
    assert result["step"] == 25
    assert snapshot(here / "kept/tale/1") == before


def test_nothing_is_trained_in_a_store(lmtrain: CommandLine, here: Path) -> None:
    lmtrain("models", "save", "run", "--name", "tale")
    before = snapshot(here)
    told = lmtrain("resume=models/tale/1", "trainer.max_steps=30", status=2).stderr
    assert told == (
        "lmtrain: models/tale/1 is a model of a store, which stays as it was saved: start with init_from=tale:1\n"
    )
    assert snapshot(here) == before


@pytest.mark.slow
def test_a_copy_goes_on_as_the_run_would_have(lmtrain: CommandLine, here: Path) -> None:
    lmtrain("models", "save", "run", "--name", "tale", "--checkpoint", "last")
    shutil.copytree(here / "models/tale/1", here / "copy")
    (here / "copy/model.json").unlink()
    for run in ("run", "copy"):
        lmtrain(f"resume={run}", "trainer.max_steps=30")
    for name in ("model.safetensors", "training_state.safetensors"):
        ours, theirs = (here / run / "checkpoints/step_00000030" / name for run in ("copy", "run"))
        assert ours.read_bytes() == theirs.read_bytes()


# ------------------------------------------------------------------------------------------- bad input

NAMES = ["../tale", "a/b", "a\\b", "", ".", "..", "-tale", ".tale", "a..b", "a\nb", "a\x00b", "ta le", "ü", "x" * 101]
IDS = [*NAMES, "tale:0", "tale:one", "tale:-1", "tale:1:1", "tale:", "tale@", "tale@v1", "../tale:1"]


def in_two_lines(err: str) -> str:
    assert 1 <= err.count("\n") <= 2, err
    assert err.startswith("lmtrain: ")
    assert not any(character < " " for character in err.replace("\n", "")), err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere_is_refused(name: str, here: Path) -> None:
    before = snapshot(here)
    with pytest.raises(ConfigError, match="a model's name is of letters, digits"):
        models.main(["save", "run", f"--name={name}"])
    with pytest.raises(ConfigError, match="a model's name is of letters, digits"):
        FolderStore(Path("models")).save(Path("run"), name)
    assert snapshot(here) == before


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("verb", ["show", "verify", "delete"])
def test_an_id_that_leads_elsewhere_is_refused(verb: str, id: str, here: Path) -> None:
    with pytest.raises(ConfigError, match=r"a model's (name|version) is|an alias has|arguments"):
        models.main([verb, *(["--yes"] if verb == "delete" else []), "--", id])


def test_bad_input_is_told_in_two_lines_and_leaves_nothing(lmtrain: CommandLine, here: Path, corpus: Path) -> None:
    store = FolderStore(here / "models")
    for name in ("whole", "changed", "damaged", "short", "more"):
        store.save(here / "run", name)
    with (here / "models/changed/1/checkpoints/step_00000020/training_state.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    (here / "models/damaged/1/model.json").write_text("{}")
    (here / "models/short/1/sample.txt").unlink()
    (here / "models/more/1/extra.txt").write_text("x")
    (here / "models/link").symlink_to(here / "outside")
    (here / "outside/1").mkdir(parents=True)
    make_run(here / "untrained", ByteTokenizer(), steps=())
    tiny = (*TINY, f"data.path={corpus}", *BUDGET)
    cases: list[tuple[Sequence[str], str]] = [
        (["models", "save", "run", "--name", "../tale"], "a model's name is of letters"),
        (["models", "save", "run", "--name", "a\nb"], "got 'a\\nb'"),
        (["models", "save", "nowhere", "--name", "tale"], "there is no run folder nowhere"),
        (["models", "save", "untrained", "--name", "tale"], "untrained has no checkpoint"),
        (["models", "save", "run", "--name", "tale", "--checkpoint", "7"], "there are last, best, 10, 15, 20"),
        (["models", "save", "run", "--name", "link"], "a link leads to"),
        (["models", "delete", "link:1", "--yes"], "a link leads to"),
        (["models", "show", "nothing"], "there is no model nothing in the store models: it holds"),
        (["models", "show", "whole:2"], "there is no model whole:2 in the store models: of whole there are 1"),
        (["models", "show", "damaged"], "models/damaged/1/model.json is damaged"),
        (["models", "delete", "nothing", "--yes"], "there is no model nothing"),
        (["models", "delete", "whole"], "there is no terminal; add --yes"),
        (["models", "verify"], "4 of 5 models not as saved: changed:1, damaged:1, more:1, short:1"),
        (["generate", "changed", "--prompt", "a"], "changed: checkpoints/step_00000020/training_state.safetensors"),
        (["generate", "models/more/1", "--prompt", "a"], "extra: extra.txt"),
        (["generate", "damaged", "--prompt", "a"], "models/damaged/1/model.json is damaged"),
        (
            ["generate", "nothing:1", "--prompt", "a"],
            "there is no run folder nothing:1 (it would hold config.yaml),",
        ),
        (["generate", "a\x1bb", "--prompt", "a"], "there is no run folder 'a\\x1bb' (it"),
        (
            [*tiny, "init_from=../tale"],
            "no run folder ../tale (it would hold config.yaml), and no model of a store has '/' in its name",
        ),
        ([*tiny, "init_from=nothing"], "a model folder of transformers would hold config.json"),
        (["models"], "name one of save, list, show, verify, delete"),
    ]
    before = snapshot(here)
    folders = [here / f"case{number}" for number in range(len(cases))]
    for folder in folders:  # a case runs in a folder of its own: here are links to what is shared
        folder.mkdir()
        for name in ("run", "untrained", "models"):
            (folder / name).symlink_to(here / name)
    statuses = lmtrain.fork([(str(folder), words) for folder, (words, _) in zip(folders, cases, strict=True)])
    for folder, (words, expected), status in zip(folders, cases, statuses, strict=True):
        told = in_two_lines(folder.with_suffix(".err").read_text())
        assert expected in told, words
        assert status == 2, (words, told)
        assert sorted(path.name for path in folder.iterdir()) in (
            ["models", "run", "untrained"],
            ["cache", "models", "run", "untrained"],  # of a training command, which may prepare its text
        ), words
        for path in (folder.with_suffix(".err"), folder.with_suffix(".out")):
            path.unlink()
        shutil.rmtree(folder)
    assert snapshot(here) == before


def test_every_change_of_a_file_is_found_and_named(here: Path, capsys: Capture) -> None:
    said(capsys, "save", "run", "--name", "tale")
    entry = here / "models/tale/1"
    for path in sorted(path for path in entry.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(ModelStoreError, match="1 of 1 models not as saved"):
            models.main(["verify", "tale"])
        assert path.name in capsys.readouterr().out
        path.write_bytes(content)
    assert said(capsys, "verify") == "tale:1  as it was saved\n"
    (entry / "sample.txt").rename(here / "sample.txt")
    (entry / "sample.txt").symlink_to(here / "sample.txt")
    with pytest.raises(ModelStoreError):
        models.main(["verify"])
    assert "changed: sample.txt" in capsys.readouterr().out


def test_a_damaged_entry_stands_in_the_list(here: Path, capsys: Capture) -> None:
    said(capsys, "save", "run", "--name", "tale")
    said(capsys, "save", "run", "--name", "tale")
    (here / "models/tale/1/model.json").write_bytes(b"\xff")
    first, second = json.loads(said(capsys, "list", "--json"))
    assert first["problem"] == "models/tale/1/model.json is damaged: it is not the metadata of a model"
    assert second["problem"] is None
    assert "is damaged" in said(capsys, "list")


# ------------------------------------------------------------------------------------------- whole or not there


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", ByteTokenizer())
    disk = tmp_path / "disk"
    disk.mkdir()
    for full_at in range(200):
        with monkeypatch.context() as patch:
            full = FullDisk(disk, full_at, patch)
            try:
                FolderStore(disk / "models").save(Path("run"), "tale")
                break
            except RunError as error:
                told = str(error)
        assert "No space left on device" in told
        assert full.failed
        assert list(disk.rglob("*")) == [], full.failed
    assert full_at > 10
    assert (disk / "models/tale/1/model.json").exists()


def test_a_real_full_disk_is_told(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ByteTokenizer())
    command = f"{sys.executable} -m lmtrain models save run --name tale --store disk/models"
    done = on_a_small_disk(tmp_path, 24, f"{command}; echo status $?; find disk -mindepth 1")
    assert "No space left on device" in in_two_lines(done.stderr)
    assert done.stdout == "status 1\n"


SAVE = """
import sys
from pathlib import Path
from lmtrain.store.folder import FolderStore
import lmtrain.training.chosen_checkpoint
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[1])):
    print(FolderStore(Path("models")).save(Path("run"), "tale")["version"], flush=True)
"""


def saving(folder: Path, times: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(times)],
        cwd=folder,
        env=CommandLine(folder).environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_processes", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_that_save_at_once_get_different_versions(num_processes: int, tmp_path: Path) -> None:
    make_run(tmp_path / "run", ByteTokenizer())
    processes = [saving(tmp_path, 3) for _ in range(num_processes)]
    written = [process.communicate("\n", timeout=120)[0] for process in processes]
    versions = [int(version) for text in written for version in text.split()]
    assert sorted(versions) == list(range(1, 3 * num_processes + 1))
    store = FolderStore(tmp_path / "models")
    assert [model.version for model in store.models("tale")] == sorted(versions)


@pytest.mark.multiprocess
def test_a_kill_leaves_no_entry_and_the_next_save_works(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ByteTokenizer())
    process = saving(tmp_path, 1000)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("models/tale/.*.partial/checkpoints")):
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    store = FolderStore(tmp_path / "models")
    whole = [] if not (tmp_path / "models/tale").exists() else store.models()
    assert all(model.problem is None for model in whole)
    version = store.save(tmp_path / "run", "tale")["version"]
    assert version == len(whole) + 1
    assert not list(tmp_path.glob("models/tale/.*"))


def test_a_store_that_cannot_be_written_is_told(here: Path) -> None:
    (here / "models").write_text("a file")
    with pytest.raises(LmtrainError, match="cannot write models: File exists"):
        models.main(["save", "run", "--name", "tale"])
    assert (here / "models").read_text() == "a file"
