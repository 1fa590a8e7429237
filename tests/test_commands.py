"""The real `python -m lmtrain`: what a run leaves behind, how it goes on, and what it tells a user who erred.

Every run here trains for seconds. Runs that only serve as material are made once for the module.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command_line import TINY, CommandLine, snapshot

from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import read_metrics, without_clocks

STEPS = 240
# A schedule that does not depend on the length of the run, so that a shorter one is the beginning of a longer.
LONG = (
    *("schedule.warmup_steps=2", "schedule.decay_fraction=0", "dropout=0.1"),
    *("trainer.eval_every=60", "trainer.checkpoint_every=20", "trainer.log_every=5"),
)


class Finished(NamedTuple):
    """A run that has ended, and what it printed."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """The program in a working folder that the tests of this module share."""
    return CommandLine(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def words(corpus: Path) -> list[str]:
    return [f"data.path={corpus}", *TINY, *LONG]


@pytest.fixture(scope="module")
def finished(shell: CommandLine, words: list[str]) -> Finished:
    """A run of STEPS steps that nothing disturbed, and what it printed."""
    done = shell(*words, f"trainer.max_steps={STEPS}")
    (folder,) = shell.folder.glob("outputs/*/*")
    return Finished(folder, done.stdout, done.stderr)


def result_of(folder: Path) -> dict[str, Any]:
    found = RunDir(folder).read_result()
    assert found is not None
    return found


def records(folder: Path) -> list[dict[str, float]]:
    """The metrics without what depends on the clock."""
    return [without_clocks(record) for record in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints/last/model.safetensors").read_bytes()


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the last bit: every metric of every step, and the weights."""
    assert records(one) == records(other)
    assert weights(one) == weights(other)


# ------------------------------------------------------------------------------------------------- a run


def test_a_run_tells_a_person_how_it_went(finished: Finished) -> None:
    folder, out, err = finished
    assert err == ""
    for part in (
        "vocabulary 257",
        f"step {STEPS}/{STEPS}",
        "sample",
        "val loss",
        "val/bits_per_byte",
        "/".join(folder.parts[-3:]),
    ):
        assert part in out
    assert "completed" in out


def test_a_run_folder_holds_what_it_takes(finished: Finished) -> None:
    folder = finished.folder
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "result.json", "checkpoints", "tokenizer.model", "plots"} <= names
    assert {"lmtrain.log", ".hydra"} <= names
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert {"last", "best", f"step_{STEPS:08d}"} <= {path.name for path in (folder / "checkpoints").iterdir()}
    checkpoint = {path.name for path in (folder / "checkpoints/last/").iterdir()}
    assert {"model.safetensors", "meta.json", "manifest.json"} <= checkpoint
    assert list((folder / "plots").glob("*.png"))
    assert not [path for path in folder.rglob("*") if ".partial" in path.name or path.suffix == ".tmp"]


def test_metrics_and_result_agree(finished: Finished) -> None:
    folder = finished.folder
    lines = read_metrics(folder / "metrics.jsonl")
    assert all({"step", "tokens", "time", "attempt"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(5, STEPS + 1, 5))
    evaluated = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    assert list(evaluated) == [60, 120, 180, 240]
    assert evaluated[STEPS] < 3 < 5 < lines[0]["train/loss"] + 1, "it has learnt something"
    result = result_of(folder)
    assert (result["status"], result["step"], result["tokens"]) == ("completed", STEPS, STEPS * 4 * 16)
    assert result["objective"] == min(evaluated.values()) == evaluated[result["best_step"]]
    assert result["metrics"]["val/loss"] == evaluated[STEPS]
    assert result["overrides"][0].startswith("data.path=")
    assert {"torch", "lmtrain"} <= result["environment"]["libraries"].keys()


def test_the_saved_config_repeats_the_run(shell: CommandLine, finished: Finished) -> None:
    folder = finished.folder
    again = shell.folder / "again"
    # resume=auto in an empty folder starts from the beginning.
    shell("--config-dir", str(folder), "--config-name", "config", f"hydra.run.dir={again}", "resume=auto")
    assert_same_run(folder, again)


# ------------------------------------------------------------------------------------------------- going on


def test_a_run_with_a_larger_budget_goes_on_as_if_never_stopped(
    shell: CommandLine, words: list[str], finished: Finished
) -> None:
    folder = shell.folder / "shorter"
    shell(*words, "trainer.max_steps=120", f"hydra.run.dir={folder}")
    assert result_of(folder)["step"] == 120
    shell("resume=shorter", f"trainer.max_steps={STEPS}")
    assert result_of(folder)["status"] == "completed"
    assert {line["attempt"] for line in read_metrics(folder / "metrics.jsonl")} == {0, 1}
    assert_same_run(finished.folder, folder)

    before = snapshot(folder)
    complete = shell("resume=shorter")
    assert f"is complete at step {STEPS}" in complete.stdout
    assert snapshot(folder) == before


def test_a_run_stopped_by_signals_goes_on_as_if_never_stopped(
    shell: CommandLine, words: list[str], finished: Finished
) -> None:
    folder = shell.folder / "stopped"
    run = [*words, f"trainer.max_steps={STEPS}", f"hydra.run.dir={folder}", "resume=auto"]

    def interrupt(number: signal.Signals, after_step: int) -> tuple[int, str]:
        with shell.start(*run) as process:
            wait_for_step(folder, after_step, process)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        return process.returncode, err

    status, err = interrupt(signal.SIGINT, after_step=5)
    assert (status, result_of(folder)["status"]) == (130, "interrupted")
    assert f"resume={folder.name}" in err
    assert "Traceback" not in err
    stopped_at = result_of(folder)["step"]
    assert 5 <= stopped_at < STEPS

    status, err = interrupt(signal.SIGTERM, after_step=stopped_at + 5)
    assert (status, result_of(folder)["status"]) == (143, "interrupted")
    assert stopped_at < result_of(folder)["step"] < STEPS

    shell(*run)
    assert_same_run_but_for_stops(finished.folder, folder)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and any(record["step"] >= step for record in read_metrics(metrics)):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.poll()}")


def assert_same_run_but_for_stops(one: Path, other: Path) -> None:
    """As `assert_same_run`; a stop logs the step it comes after, which may be none of those usually logged."""
    expected = {(record["step"], *sorted(record)): record for record in records(one)}
    found = {(record["step"], *sorted(record)): record for record in records(other)}
    assert found.items() >= expected.items()
    assert all("val/loss" not in found[key] for key in found.keys() - expected.keys())
    assert weights(one) == weights(other)


def test_a_run_starts_from_the_weights_of_another(shell: CommandLine, words: list[str], finished: Finished) -> None:
    """A continuation needs them no more."""
    origin, tuned = shell.folder / "origin", shell.folder / "tuned"
    shutil.copytree(finished.folder, origin)
    shell(*words, "trainer.max_steps=5", "lr=1e-6", f"init_from={origin}", f"hydra.run.dir={tuned}")
    loss = result_of(finished.folder)["metrics"]["val/loss"]
    assert result_of(tuned)["metrics"]["val/loss"] == pytest.approx(loss, abs=0.01)
    shutil.rmtree(origin)
    shell(f"resume={tuned}", "trainer.max_steps=7")
    assert result_of(tuned)["step"] == 7
    assert result_of(tuned)["metrics"]["val/loss"] == pytest.approx(loss, abs=0.01)
    assert f"init_from: {origin}" in (tuned / "config.yaml").read_text()


@pytest.mark.slow
def test_of_processes_that_start_together_one_gets_the_folder(shell: CommandLine, words: list[str]) -> None:
    folder = shell.folder / "raced"
    run = [*words, "trainer.max_steps=60", f"hydra.run.dir={folder}"]
    processes = [shell.start(*run) for _ in range(3)]
    told = [process.communicate(timeout=120) for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2], told
    assert result_of(folder)["status"] == "completed"


# ------------------------------------------------------------------------------------------------- MLflow


def test_a_server_that_is_not_there_is_a_warning(lmtrain: CommandLine, words: list[str]) -> None:
    run = [word for word in words if word != "tracking=none"]
    done = lmtrain(
        *run,
        "trainer.max_steps=20",
        "hydra.run.dir=run",
        "tracking.close_timeout=2",
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
    )
    assert result_of(lmtrain.folder / "run")["status"] == "completed"
    assert "MLflow at http://127.0.0.1:9" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (lmtrain.folder / "mlflow.db").exists()


# ------------------------------------------------------------------------------------------------- bad input

FILES = {
    "good.txt": b"the cat sat on the mat\n" * 200,
    "empty.txt": b"",
    "binary.txt": bytes(range(256)) * 20,
    "latin1.txt": "deux cafés au lait\n".encode("latin1") * 50,
    "short.txt": b"too short\n",
    "folder/picture.png": b"png",
    "groups/model/broken.yaml": b"d_model: [1\n",
}
GOOD = "data.path=good.txt"

REFUSED = {
    "misspelt key": ("modle.d_model=8", "did you mean model?"),
    "misspelt nested key": ("model.d_modle=8", "did you mean model.d_model?"),
    "misspelt option": ("model=nanoo", "did you mean nano?"),
    "misspelt experiment": ("experiment=shakespear", "did you mean shakespeare_char?"),
    "added key": ("+key=1", "there is no setting 'key'"),
    "no run to resume": ("resume=", "resume= names no run folder"),
    "a multirun of a resume": ("--multirun resume=run lr=1e-3,2e-3", "continues one run in place"),
    "no option": ("model=null", "model must be one of"),
    "an option removed": ("~trainer", "trainer must be one of"),
    "another working folder": (f"{GOOD} hydra.job.chdir=true", "hydra.job.chdir=true is not supported"),
    "an infinite rate": (f"{GOOD} lr=inf", "lr must be positive, got inf"),
    "a sweep outside": (f"{GOOD} sweep.name=../x", "sweep.name must stay inside multirun/"),
    "no command": ("unknownword", "cannot read the argument 'unknownword'"),
    "no flag": ("--foo", "unrecognized arguments: --foo"),
    "wrong value of a flag": ("--cfg foo", "invalid choice: 'foo'"),
    "several values": ("lr=1e-3,3e-3", "add --multirun"),
    "no such option to choose none of": ("experiment=null", "override must be a string"),
    "broken config file": ("--config-dir groups model=broken", "broken.yaml, line "),
    "wrong type": ("lr=fast", "lr: Value 'fast'"),
    "neither true, false nor a word": ("trainer.compile=yes", "trainer.compile must be true, false or auto, got 'yes'"),
    "neither a number nor a word": ("trainer.micro_batch_size=1.5", "must be a whole number or auto, got '1.5'"),
    "heads do not divide": (f"{GOOD} model.num_heads=3", "model.d_model (16) must be divisible by model.num_heads (3)"),
    "kv heads do not divide": (f"{GOOD} model.num_heads=4 model.num_kv_heads=3", "by model.num_kv_heads (3)"),
    "negative size": (f"{GOOD} model.num_layers=-1", "model.num_layers must be positive, got -1"),
    "zero size": (f"{GOOD} batch_size=0", "batch_size must be positive, got 0"),
    "two budgets": (f"{GOOD} trainer.max_epochs=1", "exactly one of trainer.max_steps"),
    "no path": ("", "data.path must be set"),
    "missing file": ("data.path=nowhere.txt", "data.path=nowhere.txt: no such file or folder"),
    "folder without text": ("data.path=folder", "no *.txt file in this folder, but .png"),
    "glob without match": ("data.path=*.md", "data.path=*.md: no file matches"),
    "empty file": ("data.path=empty.txt", "empty.txt: empty"),
    "binary file": ("data.path=binary.txt", "binary.txt is binary"),
    "not UTF-8": ("data.path=latin1.txt", "latin1.txt is not UTF-8: byte 0xe9 at offset 8"),
    "shorter than a sequence": ("data.path=short.txt", "too few for a sequence of data.seq_len=16"),
    "vocabulary too large": (f"{GOOD} tokenizer=sentencepiece_bpe", "is larger than the training text allows"),
    "warm-up too long": (f"{GOOD} schedule.warmup_steps=999999", "schedule.warmup_steps"),
    "fp16 on a CPU": (f"{GOOD} device=cpu precision=fp16", "precision=fp16 needs a CUDA device"),
    "CUDA without one": (f"{GOOD} device=cuda", "device=cuda is not available"),
    "run folder unwritable": (f"{GOOD} hydra.run.dir=good.txt/run", "cannot use good.txt/run: Not a directory"),
    "sweep folder unwritable": (f"-m {GOOD} hydra.sweep.dir=good.txt/sweep lr=1,2", "cannot use good.txt/sweep"),
    "cache unwritable": (f"{GOOD} data.cache_dir=good.txt", "cannot write prepared data to good.txt"),
    "nothing to resume": ("resume=nowhere", "there is no run folder nowhere"),
    "resume of no run": ("resume=folder", "there is no run folder folder"),
    "nothing to start from": (f"{GOOD} init_from=nowhere", "there is no run folder"),
    "a grid of wrong points": (f"-m {GOOD} model.num_heads=3,5", "must be divisible by model.num_heads"),
    "a grid of a misspelt key": ("-m lrr=1,2", "did you mean lr?"),
    "run folder in use": (f"{GOOD} hydra.run.dir=busy", "busy is in use by another process"),
    "run folder taken": (f"{GOOD} hydra.run.dir=run", "already holds a run; continue it with resume="),
    "another tokenizer": (
        f"{GOOD} tokenizer=char init_from=run",
        "its tokenizer is another (byte of 257 ids there",
    ),
    "another model": (f"{GOOD} model.d_model=32 init_from=run", "model.d_model is 16 there and 32 here"),
    "resume of another model": ("resume=run model.d_model=32", "be continued otherwise than it was begun"),
    "resume with another option": ("resume=run model=tiny", "model=tiny: a run's own config takes settings"),
}
WHOLE = ("resume=", "--")  # cases that say all there is to say


@dataclass(frozen=True)
class Refusal:
    """How a case ended."""

    status: int
    out: str
    err: str
    touched: set[str]  # what is new, changed or gone in the working folder


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory, finished: Finished) -> dict[str, Refusal]:
    """Every case of REFUSED, each in a folder with FILES, a finished `run`, and `busy`, which is in use."""
    root = tmp_path_factory.mktemp("refused")
    cases, before, busy = [], {}, []
    for number, (name, (line, _)) in enumerate(REFUSED.items()):
        folder = root / str(number)
        shutil.copytree(finished.folder, folder / "run", symlinks=True)
        for path, content in FILES.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        busy.append(RunDir(folder / "busy"))
        busy[-1].lock()
        words = line.split()
        cases.append((str(folder), words if line.startswith(WHOLE) else [*words[:1], *TINY, *words[1:]]))
        before[name] = snapshot(folder)
    statuses = CommandLine(root).fork(cases)
    told = {}
    for name, (place, _), status in zip(REFUSED, cases, statuses, strict=True):
        out, err = (Path(f"{place}.{end}").read_text() for end in ("out", "err"))
        touched = {path for path, _ in before[name].items() ^ snapshot(Path(place)).items()}
        told[name] = Refusal(status, out, err, touched)
    return told


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_told_in_a_line_or_two(name: str, refusals: dict[str, Refusal]) -> None:
    case = refusals[name]
    lines = case.err.splitlines()
    assert REFUSED[name][1] in case.err
    assert case.status == 2
    assert 1 <= len(lines) <= 2
    assert any(line.startswith("lmtrain: ") for line in lines)
    assert "Error" not in case.out, "told once, in one place"
    assert not [path for path in case.touched if not path.startswith("cache")]
    # Text that could be prepared stays in the cache, whole; of other text at most an empty lock does.
    entries = [path for path in case.touched if re.fullmatch(r"cache/prepared/[^/]+", path) and path[-5:] != ".lock"]
    assert all(f"{entry}/manifest.json" in case.touched and entry[-6:] != ".draft" for entry in entries)


# ------------------------------------------------------------------------------------------------- start-up

HEAVY = {"torch", "mlflow", "datasets", "optuna", "matplotlib", "pandas"}


@pytest.mark.parametrize(
    ("line", "status"),
    [("--help", 0), ("--cfg job", 0), ("model=nanoo", 2), ("model.num_heads=3", 2), ("unknownword", 2)],
)
def test_help_and_errors_import_nothing_heavy(lmtrain: CommandLine, line: str, status: int) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lmtrain", *line.split()],
        cwd=lmtrain.folder,
        env=lmtrain.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert done.returncode == status
    assert "hydra" in imported
    assert not imported & HEAVY
    assert seconds < 5, "half a second on a quiet machine"
    assert list(lmtrain.folder.iterdir()) == []


def test_help_lists_commands_groups_and_settings(lmtrain: CommandLine) -> None:
    out = lmtrain("--help").stdout
    for part in ("--multirun", "nano", "shakespeare_char", "sentencepiece_bpe", "lr: ", "batch_size: "):
        assert part in out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("model=", {"model=nano", "model=tiny"}),
        ("experiment=sh", {"experiment=shakespeare_char"}),
        ("trainer.max_s", {"trainer.max_steps="}),
    ],
)
def test_tab_completion(lmtrain: CommandLine, typed: str, offered: set[str]) -> None:
    line = f"lmtrain {typed}"
    done = lmtrain("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert offered <= set(done.stdout.split())
    assert all(word.startswith(typed) for word in done.stdout.split())
