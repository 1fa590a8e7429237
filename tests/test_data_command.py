"""`lmtrain data`: the settings a command composes, what it shows of a corpus and of a batch, what it frees."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import TINY, CommandLine, snapshot

from lmtrain.commands import data as data_command
from lmtrain.config import compose
from lmtrain.config.explain import REQUEST_ERRORS, explain
from lmtrain.config.saved import to_yaml
from lmtrain.data.prepare import prepare
from lmtrain.errors import LmtrainError
from lmtrain.feeding import train_batches


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with nothing but its settings."""
    words = [*TINY, "data.path=nowhere.txt", "lr=0.5"]
    folder = tmp_path / "a run=of, [mine]"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(compose.compose_config(words)))
    return folder


def test_a_command_composes_what_training_would() -> None:
    config = compose.compose_config(["model=tiny", "lr=0.25", "trainer.max_steps=7"])
    assert (config.lr, config.trainer.max_steps, config.model.num_layers) == (0.25, 7, 8)


def test_a_command_starts_from_the_settings_of_a_run(run: Path) -> None:
    config = compose.compose_config([], run)
    assert (config.lr, config.data.seq_len, config.model.d_model, config.resume) == (0.5, 16, 16, None)
    changed = compose.compose_config(["seed=3", "data.seq_len=8"], run)
    assert changed == replace(config, seed=3, data=replace(config.data, seq_len=8), sweep=changed.sweep)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("modle.d_model=8", "did you mean model?"),
        ("model=nanoo", "model has no option 'nanoo'; did you mean nano?"),
        ("model=null", "model must be one of"),
        ("~trainer", "trainer must be one of"),
        ("lr=fast", "lr: Value 'fast'"),
        ("lr=1,2", "names several values"),
        ("data=text", "data.path must be set"),
        ("unknownword", "cannot read the argument 'unknownword'"),
        ("+key=1", "there is no setting 'key'"),
        ("resume=nowhere", "resume=nowhere: there is no run folder nowhere"),
    ],
)
def test_a_wrong_word_is_told_as_to_training(words: str, message: str) -> None:
    with pytest.raises((LmtrainError, *REQUEST_ERRORS)) as raised:
        compose.compose_config(words.split())
    assert message in explain(raised.value)


def test_a_run_takes_no_options(run: Path) -> None:
    with pytest.raises(ValueError, match="a run's own config takes settings"):
        compose.compose_config(["model=tiny"], run)


def test_a_run_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="there is no run folder"):
        compose.compose_config([], tmp_path)


# ------------------------------------------------------------------------------------------------- inspect

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of a text of 60 different lines, each a document, with what a terminal would act upon."""
    lines = [f"line {number}: a café\x1b[31m in red\t{'x' * (number % 7)}" for number in range(60)]
    (tmp_path / "my text.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    return [*TINY, "data.path='my text.txt'", "data.document=line", "trainer.max_steps=50"]


def shown_rows(out: str) -> list[str]:
    """The text of every row that `inspect --step` prints, with a `|` between documents."""
    rows = re.split(r"^row \d+: .*$", out, flags=re.MULTILINE)[1:]
    return ["|".join(re.findall(r"^ +\d+ \| (.*)$", row, flags=re.MULTILINE)) for row in rows]


def trained_rows(words: list[str], step: int, run: Path | None = None) -> list[str]:
    """The same, of what a trainer gets."""
    config = compose.compose_config(words, run)
    data = prepare(config.data, config.tokenizer)
    batch = train_batches(config, data)[step - 1]
    rows = [[*inputs, int(targets[-1])] for inputs, targets in zip(batch.inputs.tolist(), batch.targets, strict=True)]
    decode, end = data.tokenizer.decode, data.tokenizer.end_id
    texts = []
    for row in rows:
        ends = [place + 1 for place, token in enumerate(row) if token == end and place + 1 < len(row)]
        texts.append("|".join(decode(row[a:b]) for a, b in zip([0, *ends], [*ends, len(row)], strict=True)))
    return [text.replace("\x1b", r"\x1b").replace("\t", r"\t") for text in texts]


RAMPS = (
    *("trainer.batch_size_warmup_steps=10", "trainer.initial_batch_size=1"),
    *("trainer.seq_len_warmup_steps=20", "trainer.initial_seq_len=4"),
)


@pytest.mark.parametrize(("ramps", "step"), [((), 1), ((), 50), (RAMPS, 1), (RAMPS, 9), (RAMPS, 12), (RAMPS, 40)])
def test_a_step_is_shown_as_it_is_trained_on(
    words: list[str], ramps: tuple[str, ...], step: int, capsys: Capture
) -> None:
    assert data_command.main(["inspect", "--full", "--step", str(step), *words, *ramps]) == 0
    rows = shown_rows(capsys.readouterr().out)
    assert len(rows) > 0
    assert rows == trained_rows([*words, *ramps], step)


def test_a_long_row_is_cut_unless_all_of_it_is_wanted(words: list[str], capsys: Capture) -> None:
    long = ["inspect", "--step=2", *words, "data.seq_len=300", "data.document=file"]
    data_command.main(long)
    out = capsys.readouterr().out
    assert "… 201 more tokens, shown by --full" in out
    assert out.count("\nrow ") == 4
    data_command.main([*long, "--full"])
    assert "--full" not in capsys.readouterr().out


def test_the_text_is_counted_and_sampled(words: list[str], capsys: Capture) -> None:
    data_command.main(["inspect", *words, "--samples", "2", "data.min_chars=28"])
    out = capsys.readouterr().out
    config = compose.compose_config([*words, "data.min_chars=28"])
    (source,) = prepare(config.data, config.tokenizer).sources
    assert not source.built
    for split in source.splits.values():
        for number in (len(split.documents), len(split.documents.tokens), split.num_bytes):
            assert f"{number:,}" in out
        assert f"{split.num_bytes / len(split.documents.tokens):.3f}" in out
    assert "2 documents: shorter than data.min_chars=28" in out
    assert f"{source.folder} (" in out
    assert "built now" in out
    assert "vocabulary 257" in out
    assert len(re.findall(r"^document \d+ of \d+: ", out, flags=re.MULTILINE)) == 2
    histogram = re.findall(r"^ +[\d,]+ to [\d,]+ +([\d,]+)", out, flags=re.MULTILINE)
    assert sum(int(count) for count in histogram) == len(source.splits["train"].documents)

    data_command.main(["inspect", *words, "--samples", "0"])
    out = capsys.readouterr().out
    assert "found there" not in out, "another text: nothing is left out"
    data_command.main(["inspect", *words, "--samples", "0"])
    again = capsys.readouterr().out
    assert "found there" in again
    assert "\ndocument" not in again
    assert "\x1b" not in out + again


def test_a_dropped_step_is_logged_with_a_command_that_shows_it(lmtrain: CommandLine, words: list[str]) -> None:
    poison = ["lr=1e30", "optimizer=sgd", "trainer.grad_clip=null", "trainer.on_nonfinite=stop"]
    done = lmtrain(*words, *poison, "hydra.run.dir='my run'", status=1)
    address = re.search(r"lmtrain (data inspect .* --step (\d+))$", done.stdout, flags=re.MULTILINE)
    assert address is not None
    shown = lmtrain(*shlex.split(address[1]), "--full")
    assert shown.stderr == ""
    step = int(address[2])
    assert f"step {step} of 50: 4 rows of 16 tokens" in shown.stdout
    assert shown_rows(shown.stdout) == trained_rows([], step, Path("my run"))

    # The text is another one now, and what it says is not what the run saw.
    Path("my text.txt").write_text("something else\n" * 100)
    assert "my run was trained on other tokens" in lmtrain(*shlex.split(address[1])).stderr


BAD = {
    "inspect nowhere": "there is no run folder nowhere",
    "inspect .": "there is no run folder .",
    "inspect --step -1": "--step must be one of the run's steps, 1 to 50, got -1",
    "inspect --step 0": "1 to 50, got 0",
    "inspect --step 51": "1 to 50, got 51",
    "inspect --step one": "invalid int value: 'one'",
    "inspect --samples -1": "--samples must not be negative, got -1",
    "inspect --flag": "unrecognized arguments: --flag",
    "inspect data.path=gone.txt": "data.path=gone.txt: no such file or folder",
    "inspect data.seq_len=99999 --step 1": "too few for a sequence",
    "inspect data.sq_len=1": "did you mean data.seq_len?",
    "inspct": "invalid choice: 'inspct'",
    "": "name one of inspect, clean-cache",
    "clean-cache": "there is no terminal; add --yes or --dry-run",
    "clean-cache --yes --dry-run": "not allowed with",
    "clean-cache everything": "cannot read the argument 'everything'",
}


@pytest.mark.parametrize("line", BAD)
def test_a_wrong_request_is_told_in_a_line(line: str, words: list[str], capsys: Capture) -> None:
    extra = words if line.startswith("inspect -") or "data." in line else []
    data_command.main(["inspect", *words])  # so that there is something in the cache
    before = snapshot(Path("cache"))
    with pytest.raises((LmtrainError, *REQUEST_ERRORS)) as raised:
        data_command.main([*line.split()[:1], *extra, *line.split()[1:]])
    error = raised.value
    message = str(error) if isinstance(error, LmtrainError) else explain(error)  # as the program shows it
    assert BAD[line] in message
    assert len(message.splitlines()) <= 2
    assert getattr(error, "exit_status", 2) == 2
    assert {name: state for name, state in snapshot(Path("cache")).items() if name in before} == before


def test_a_run_whose_text_is_gone_is_told(lmtrain: CommandLine, run: Path) -> None:
    done = lmtrain("data", "inspect", str(run), status=2)
    assert done.stderr == "lmtrain: data.path=nowhere.txt: no such file or folder\n"
    assert [path.name for path in lmtrain.folder.iterdir()] == [run.name]


# ------------------------------------------------------------------------------------------------- clean-cache


def test_clean_cache_frees_what_was_prepared(words: list[str], capsys: Capture) -> None:
    data_command.main(["inspect", *words])
    capsys.readouterr()
    before = snapshot(Path("cache"))
    data_command.main(["clean-cache", "--dry-run"])
    assert "my text.txt" in (dry := capsys.readouterr().out)
    assert "in 1 prepared text of " in dry
    assert snapshot(Path("cache")) == before

    data_command.main(["clean-cache", "--yes"])
    size = re.search(r"freed (\S+) MB", capsys.readouterr().out)
    assert size is not None
    assert not [path for path in Path("cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    data_command.main(["clean-cache", "--yes"])
    assert "0.00 MB  in 0 prepared texts" in capsys.readouterr().out
    data_command.main(["inspect", *words])
    assert "built now" in capsys.readouterr().out


def test_clean_cache_cleans_the_cache_that_is_named(words: list[str], capsys: Capture) -> None:
    data_command.main(["inspect", *words, "data.cache_dir=other"])
    data_command.main(["inspect", *words])
    before = snapshot(Path("cache"))
    data_command.main(["clean-cache", "--yes", "data.cache_dir=other"])
    assert snapshot(Path("cache")) == before
    assert not list(Path("other/prepared").glob("*/"))


@pytest.mark.parametrize(("answer", "left"), [("n", 1), ("", 1), ("y", 0)])
def test_clean_cache_asks_first(
    words: list[str], answer: str, left: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    data_command.main(["inspect", *words])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    data_command.main(["clean-cache"])
    assert len(list(Path("cache/prepared").glob("*/"))) == left
