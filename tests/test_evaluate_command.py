"""`lmtrain evaluate`: the numbers of training again, what goes to which file, translations, bad input."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from command_line import TINY, CommandLine
from small_tokenizers import WORDS, sample_text
from trained_runs import composed_once, make_run

from lmtrain.commands import evaluate as command
from lmtrain.config import evaluation as evaluation_settings
from lmtrain.config.compose import compose_config
from lmtrain.data import prepare as prepare_module
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.errors import LmtrainError
from lmtrain.inference import TrainedModel, load_model
from lmtrain.inference import trained as trained_module
from lmtrain.inference import translation as translation_module
from lmtrain.inference.evaluation_view import EvaluationView, json_line
from lmtrain.inference.translation import translate
from lmtrain.run import run_experiment

Capture = pytest.CaptureFixture[str]

BUDGET = ("trainer.max_steps=12", "trainer.eval_every=4", "trainer.keep_checkpoints=9", "trainer.sample_tokens=0")
WITHOUT_DATA = [word for word in TINY if not word.startswith(("data=", "model.", "tokenizer="))]
SMALL = ("model.d_model=16", "model.num_heads=2")
DECODER = (*SMALL, "model.num_layers=1")
PAIRS = ("data=pairs", "data.path=pairs.jsonl", "data.source=s", "data.target=t", "tokenizer=byte", "data.seq_len=64")
BPE = ("tokenizer=sentencepiece_bpe", "tokenizer.vocab_size=340")
KINDS: dict[str, tuple[str, ...]] = {
    "packed": ("data=text", "data.path=lines.txt", *BPE, *DECODER),
    "packed_documents": (
        *("data=text", "data.path=lines.txt", "data.document=line", "data.batches=packed_documents", "tokenizer=char"),
        *("data.test_fraction=0.2", "trainer.micro_batch_size=3", *DECODER),
    ),
    "padded": ("data=chat", "data.path=chat.jsonl", "tokenizer=byte", "data.seq_len=32", *DECODER),
    "mixture": (
        *("data=mixture", "+data@data.sources.a=text", "+data@data.sources.b=jsonl", "data.sources.b.field=s"),
        *("data.sources.a.path=lines.txt", "data.sources.b.path=pairs.jsonl", "trainer.eval_batches=1", *BPE, *DECODER),
    ),
    "translator": (
        *("model=seq2seq_nano", "model.num_encoder_layers=1", "model.num_decoder_layers=1", *PAIRS, *SMALL, "lr=0.02"),
    ),
    "pairs": (*PAIRS, *DECODER),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a trained run of each kind, and their texts."""
    folder = tmp_path_factory.mktemp("work")
    words = sample_text(700).split()
    lines = [" ".join(words[start : start + 6]) for start in range(0, len(words), 6)]
    (folder / "lines.txt").write_text("\n".join(lines))
    talks = [
        {"messages": [{"role": "user", "content": line[:20]}, {"role": "assistant", "content": line[-18:]}]}
        for line in lines
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, talks)))
    pairs = [{"s": f"{one} {two}", "t": one.upper()} for one in WORDS[:9] for two in WORDS[:9]]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMTRAIN_CACHE", "cache")
        for kind, settings in KINDS.items():
            config = compose_config([*WITHOUT_DATA, *settings, *BUDGET])
            assert run_experiment(config, Path(kind), judge=Patience()).status == "completed"
    return folder


class Patience:
    """Lets a run go on, which draws no pictures as it belongs to a study."""

    def __call__(self, tokens: int, score: float) -> bool:
        return False

    def read(self, texts: Mapping[str, str]) -> None:
        pass


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LMTRAIN_CACHE", "cache")
    for module in (trained_module, evaluation_settings):
        monkeypatch.setattr(module, "compose_config", composed_once)


def asked(capsys: Capture, *words: str) -> dict[str, Any]:
    """What `--json` prints: one object on standard output."""
    assert command.main([*words, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def recorded(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of every evaluation of a run, by step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record for record in records if "val/loss" in record}


# ------------------------------------------------------------------------------------------- the numbers of training


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_training_are_found_again(kind: str, folder: Path, capsys: Capture) -> None:
    """To the bit, at every checkpoint, without preparing anything again."""
    evaluated = recorded(folder / kind)
    assert len(evaluated) == 3
    best = min(evaluated, key=lambda step: evaluated[step]["val/loss"])
    before = sorted((folder / "cache" / "prepared").iterdir())
    for words, step in [([], best), (["--checkpoint", "4"], 4)]:
        found = asked(capsys, kind, *words, "--max-sentences=0" if kind in ("translator", "pairs") else "--split=val")
        assert found["step"] == step
        for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
            assert found[name] == evaluated[step][name]
    assert sorted((folder / "cache" / "prepared").iterdir()) == before


def test_the_tokenizer_of_the_run_is_never_made_again(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not where the cache was emptied, nor of another text."""
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare_module, "sample_for", lambda config: None if "path" in vars(config) else 1 / 0)
    assert asked(capsys, "packed")["val/loss"] == recorded(folder / "packed")[12]["val/loss"]
    other = asked(capsys, "packed", "data=jsonl", "data.path=pairs.jsonl", "data.field=s")
    assert (other["split"], other["documents"]) == ("all", 81)
    assert other["all/loss"] > 0


def test_a_text_that_has_changed_is_told(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    command.main(["packed", "--json"])
    assert "changed" not in capsys.readouterr().err
    text = (folder / "lines.txt").read_text()
    try:
        (folder / "lines.txt").write_text(text + " and more")
        command.main(["packed", "--json"])
    finally:
        (folder / "lines.txt").write_text(text)
    assert "the text has changed since packed was trained on it" in capsys.readouterr().err


def test_a_text_that_is_divided_otherwise_is_told(capsys: Capture) -> None:
    note = "lmtrain: the text is divided otherwise than for training: val may hold what was trained on\n"
    for words, told in (["data.document=line"], True), (["data.seq_len=8"], False), (["--split", "all"], False):
        command.main(["packed", *words])
        assert (note in capsys.readouterr().err) == told


def test_splits(folder: Path, capsys: Capture) -> None:
    found = {split: asked(capsys, "packed_documents", "--split", split) for split in ("train", "val", "test", "all")}
    counts = [found[split]["documents"] for split in ("train", "val", "test")]
    assert sum(counts) == found["all"]["documents"] == len((folder / "lines.txt").read_text().splitlines())
    assert all(f"{split}/loss" in found[split] for split in found)


# ------------------------------------------------------------------------------------------- what is printed


def test_lines_hold_what_json_does(capsys: Capture) -> None:
    found = asked(capsys, "mixture")
    assert set(found["sources"]) == {"a", "b"}
    command.main(["mixture"])
    out, err = capsys.readouterr()
    lines = dict(line.split(" ", 1) for line in out.splitlines())
    flat = {key: value for key, value in found.items() if key != "sources"}
    flat |= {f"sources.{name}.{key}": value for name, own in found["sources"].items() for key, value in own.items()}
    assert lines == {key: str(value) for key, value in flat.items()}
    assert list(lines)[:6] == ["run", "step", "data", "split", "documents", "targets"]
    missing = found["targets"] - found["counted"]
    assert err.startswith(
        f"lmtrain: not counted: {missing:,} of {found['targets']:,} targets; the first token of a text"
    )
    assert err.endswith("; only the first 8 of 12 windows are read, as trainer.eval_batches says\n")
    whole = asked(capsys, "mixture", "trainer.eval_batches=null")
    assert whole["counted"] == whole["targets"] - 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "100")
    found = asked(capsys, "mixture")
    terminal = Terminal()
    view = EvaluationView(terminal, as_json=False)
    view.begin(found)
    assert terminal.getvalue().splitlines()[0] == f"run    mixture at step {found['step']}, in fp32 on cpu"
    view.end(found)
    shown = [line.split() for line in terminal.getvalue().splitlines()]
    assert ["source", "documents", "counted", "loss", "perplexity", "bits/byte"] in shown
    for name, own in {**found["sources"], "all": found}.items():
        numbers = f"{own['val/loss']:.4f} {own['val/perplexity']:,.2f} {own['val/bits_per_byte']:.4f}"
        assert [name, f"{own['documents']:,}", f"{own['counted']:,}", *numbers.split()] in shown


def test_json_has_no_nan() -> None:
    assert (
        json_line({"a": float("nan"), "b": {"c": float("inf")}, "d": "ü"}) == '{"a": null, "b": {"c": null}, "d": "ü"}'
    )


def test_documents_go_to_a_file_or_to_standard_output(folder: Path, capsys: Capture, tmp_path: Path) -> None:
    words = ["packed_documents", "--stride", "4"]
    found = asked(capsys, *words, "--per-document", str(tmp_path / "documents.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert len(records) == found["documents"]
    assert sum(one["tokens"] for one in records) == found["counted"] == found["targets"]
    assert sum(one["bytes"] for one in records) == found["bytes"]
    loss = sum(one["tokens"] * one["loss"] for one in records) / found["counted"]
    assert loss == pytest.approx(found["val/loss"], rel=1e-9)
    command.main([*words, "--per-document", "-"])
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == records
    assert f"val/loss {found['val/loss']}\n" in err


# ------------------------------------------------------------------------------------------- translations


@pytest.mark.parametrize("kind", ["translator", "pairs"])
def test_sources_are_translated_and_scored(kind: str, folder: Path, capsys: Capture, tmp_path: Path) -> None:
    found = asked(capsys, kind, "--translations", str(tmp_path / "made.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(records) == found["sentences"] == found["documents"] == 8
    assert all({"s": one["source"], "t": one["reference"]} in pairs for one in records)
    assert found["beams"] == 4
    trained = load_model(folder / kind)
    alone = [translate(trained, [one["source"]], num_beams=found["beams"])[0] for one in records]
    assert [one["hypothesis"] for one in records] == alone  # whatever they are translated with
    made, references = [one["hypothesis"] for one in records], [[one["reference"] for one in records]]
    assert found["val/bleu"] == sacrebleu.corpus_bleu(made, references).score
    assert found["val/chrf"] == sacrebleu.corpus_chrf(made, references).score
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    command.main([kind, "--beams", "2", "--max-sentences", "3", "--translations", str(tmp_path / "made.tsv")])
    assert "\nbeams 2\n" in capsys.readouterr().out
    with (tmp_path / "made.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, dialect="excel-tab"))
    assert [row["source"] for row in rows] == [one["source"] for one in records[:3]]
    assert rows[0].keys() == {"source", "reference", "hypothesis"}


def test_a_model_that_says_the_reference_has_a_perfect_score(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {one["s"]: one["t"] for one in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())}
    monkeypatch.setattr(
        translation_module, "translate", lambda trained, sources, **_: [answers[source] for source in sources]
    )
    found = asked(capsys, "translator", "--split", "train")
    assert found["train/chrf"] == 100
    assert found["sentences"] == 73


def test_a_translation_that_does_not_end_is_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At twice the source, in multiples of 8 tokens, and 50 more; or where the context of a decoder is full."""
    limits: list[int] = []

    def generate(self: TrainedModel, prompts: list[list[int]], *_: Any, max_new_tokens: int, **__: Any) -> list[str]:
        limits.extend(max_new_tokens for _ in prompts)
        return ["" for _ in prompts]

    monkeypatch.setattr(TrainedModel, "generate", generate)
    long = make_run(folder / "long", ByteTokenizer(), *PAIRS[:-1], "data.seq_len=128")
    for run, expected in ((long, [66, 25]), (Path("translator"), [64, 64])):
        translate(load_model(run), ["a" * 6, "b" * 100], num_beams=1)
        assert limits == expected
        limits.clear()


# ------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def bad(folder: Path) -> Path:
    """Folders that hold no trained run."""
    (folder / "empty").mkdir(exist_ok=True)
    if not (folder / "untrained").exists():
        make_run(folder / "untrained", ByteTokenizer(), steps=())
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", "there is no run folder nowhere"),
        ("empty", "there is no run folder empty"),
        ("untrained", "untrained has no checkpoint"),
        ("", "arguments are required: RUN;"),
        ("packed --checkpoint 5", "packed has no checkpoint '5'; there are last, best, 4, 8, 12"),
        ("packed --split valid", "invalid choice: 'valid' (choose from 'train', 'val', 'test', 'all')"),
        ("packed --split test", "lines.txt has no test split; there are train, val, all"),
        ("packed --stride 17", "the stride must lie between 1 and data.seq_len=16, got 17"),
        ("packed --stride x", "argument --stride: invalid int value: 'x'"),
        ("packed lr=1", "lr=1: a trained model is evaluated as it is"),
        ("packed --device tpu", "device=tpu is not available to PyTorch here"),
        ("packed --precision fp16", "precision=fp16 needs a CUDA device"),
        ("packed --precision fp64", "argument --precision: invalid choice: 'fp64'"),
        ("packed data=text data.path=nowhere.txt", "nowhere.txt"),
        (
            "packed_documents data=jsonl data.path=pairs.jsonl data.field=t",
            "does not occur in the text the char",
        ),
        ("packed data=chat data.path=chat.jsonl", "it has no token <|system|>, which conversations need"),
        ("packed --beams 2", "--beams is for translations, and there are none: the data are no pairs"),
        (f"packed {' '.join(PAIRS[:4])} --beams 2", "there are none: the model was not trained on pairs"),
        ("translator --beams 0", "--beams must be at least 1, got 0"),
        ("translator --max-sentences -1", "--max-sentences must not be negative, got -1"),
        ("translator --translations made.txt", "--translations must end in .tsv or .jsonl, got made.txt"),
        ("translator --translations nowhere/made.tsv", "cannot write nowhere/made.tsv: No such file or directory"),
        ("packed --per-document empty", "cannot write empty: Is a directory"),
        ("packed --json --per-document -", "--json and --per-document - both want standard output"),
    ],
)
def test_a_bad_request_is_told(words: str, message: str, bad: Path, capsys: Capture) -> None:
    before = sorted(bad.iterdir())
    with pytest.raises(LmtrainError) as raised:
        command.main(words.split())
    assert message in str(raised.value)
    assert raised.value.exit_status == 2
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().out == ""
    assert sorted(bad.iterdir()) == before


def test_a_failure_leaves_files_as_they_were(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.jsonl").write_text("kept")
    for name in ("old.jsonl", "new.jsonl"):
        with pytest.raises(LmtrainError):
            command.main(["packed", "--checkpoint", "5", "--per-document", str(tmp_path / name)])
    assert (tmp_path / "old.jsonl").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_after_the_numbers(capsys: Capture) -> None:
    with pytest.raises(LmtrainError, match="cannot write /dev/full: No space left on device") as raised:
        command.main(["packed", "--per-document", "/dev/full"])
    assert raised.value.exit_status == 1
    assert "val/loss" in capsys.readouterr().out


def test_the_program_tells_a_bad_request_in_a_line(folder: Path, lmtrain: CommandLine) -> None:
    refused = lmtrain("evaluate", str(folder / "packed"), "data.pth=x", status=2)
    assert refused.stderr == "lmtrain: there is no setting 'data.pth'; did you mean data.path?\n"
    assert refused.stdout == ""
