"""What a trained model is evaluated on and how its losses are counted: against naive computation, and by the bit."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_tokenizers import foreign_huggingface
from tokenizers import Tokenizer as Library
from tokenizers import normalizers
from torch import Tensor
from trained_runs import chat_tokenizer, make_run

from lmtrain.config.evaluation import EvaluationSettings
from lmtrain.config.schema import ChatConfig, DataConfig, MixtureConfig, PairsConfig, TextConfig, TokensConfig
from lmtrain.data.prepare import prepare
from lmtrain.data.tokenizer import ByteTokenizer, CharTokenizer, IdsTokenizer, Tokenizer
from lmtrain.data.tokenizer.huggingface import adopt_huggingface
from lmtrain.errors import ConfigError, DataError, HardwareError
from lmtrain.inference import TrainedModel, load_model
from lmtrain.inference import evaluation as evaluation_module
from lmtrain.inference.evaluated_text import EvaluatedText, Split, open_text
from lmtrain.inference.evaluation import Evaluation, choose_precision, evaluate_text
from lmtrain.inference.evaluation_records import document_records, summary
from lmtrain.run_dir import RunDir
from lmtrain.training.evaluation import measure

SEQ_LEN = 16  # of TINY
LINES = ["a", "the cat sat on the mat and the dog ran away", "", "ü and the rest of it", "x" * 70, "end"]
TEXTS = [line for line in LINES if line]
TALKS = [
    ["hi", "hello there, who are you?", "ü?", "nobody of note"],
    ["what is it", "it is what it is, said the cat to the dog"],
    ["a", "b"],
]
PAIRS = [("ein Hund", "a dog"), ("eine Katze", "a cat runs ü"), ("x" * 20, "lost"), ("b", "c" * 30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, conversations, pairs, and a cache."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "lines.txt").write_text("\n".join(LINES))
    turns = [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(talk)]}
        for talk in TALKS
    ]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, turns)))
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"s": s, "t": t}) for s, t in PAIRS))
    return folder


def lines(folder: Path, **settings: Any) -> TextConfig:
    return TextConfig(path=str(folder / "lines.txt"), **common(folder, {"document": "line"} | settings))


def talks(folder: Path, **settings: Any) -> ChatConfig:
    return ChatConfig(path=str(folder / "chat.jsonl"), **common(folder, settings))


def pairs(folder: Path, **settings: Any) -> PairsConfig:
    return PairsConfig(path=str(folder / "pairs.jsonl"), source="s", target="t", **common(folder, settings))


def common(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return {"seq_len": SEQ_LEN, "cache_dir": str(folder / "cache")} | settings


loaded = functools.cache(load_model)


def opened(run: Path, data: DataConfig, split: Split | None = None) -> tuple[EvaluationSettings, EvaluatedText]:
    """Of other text than the run's."""
    trained = loaded(run)
    settings = EvaluationSettings(
        replace(trained.config, data=data), other_text=True, other_documents=False, limited=False
    )
    return settings, open_text(RunDir(run), settings, trained.tokenizer, split)


def evaluated(run: Path, data: DataConfig, *, stride: int | None = None) -> tuple[TrainedModel, Evaluation]:
    """All documents of the data, one by one."""
    trained, (settings, text) = loaded(run), opened(run, data)
    precision = choose_precision(trained)
    return trained, evaluate_text(trained, settings, text, precision, stride=stride, per_document=True)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """Models with random weights, by how their text was read."""
    return {
        batches: make_run(folder / batches, chat_tokenizer(), f"data.batches={batches}", "batch_size=3")
        for batches in ("packed", "packed_documents", "padded")
    }


def log_probabilities(model: torch.nn.Module, inputs: Sequence[int]) -> Tensor:
    """[T, V], after each of the inputs."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([inputs]))[0].float()
        return logits.log_softmax(dim=-1)


def by_the_guide(model: torch.nn.Module, tokens: Sequence[int], stride: int) -> list[float]:
    """Nats of tokens[1:], by the loop of "Perplexity of fixed-length models" in the transformers documentation."""
    nats: list[float] = []
    length, previous_end = len(tokens) - 1, 0
    for begin in range(0, length, stride):
        end = min(begin + SEQ_LEN, length)
        table = log_probabilities(model, tokens[begin:end])
        nats += [-table[place - begin, tokens[place + 1]].item() for place in range(previous_end, end)]
        previous_end = end
        if end == length:
            break
    return nats


def encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(text).tolist(), tokenizer.end_id]


# ------------------------------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize("stride", [1, 5, SEQ_LEN])
@pytest.mark.parametrize("batches", ["packed", "padded"])
def test_sliding_windows_are_those_of_the_guide(batches: str, stride: int, folder: Path, runs: dict[str, Path]) -> None:
    """A document begins after an end token, as in a stream; where training reads it alone, with its first token."""
    trained, found = evaluated(runs[batches], lines(folder, batches=batches), stride=stride)
    documents = found.parts[0].documents
    assert documents is not None
    total = 0.0
    for number, text in enumerate(TEXTS):
        ids = encoded(text, trained.tokenizer)
        nats = by_the_guide(trained.model, [trained.tokenizer.end_id, *ids] if batches == "packed" else ids, stride)
        assert documents.num_targets[number] == len(nats) == len(ids) - (batches == "padded")
        assert documents.nats[number] == pytest.approx(sum(nats), rel=1e-5)
        total += sum(nats)
    assert found.nats == pytest.approx(total, rel=1e-6)


def test_with_a_stride_of_one_every_token_has_all_the_context_there_is(folder: Path, runs: dict[str, Path]) -> None:
    trained, found = evaluated(runs["packed"], lines(folder), stride=1)
    documents = found.parts[0].documents
    assert documents is not None
    for number, text in enumerate(TEXTS):
        tokens = [trained.tokenizer.end_id, *encoded(text, trained.tokenizer)]
        nats = [
            -log_probabilities(trained.model, tokens[max(0, place - SEQ_LEN) : place])[-1, tokens[place]].item()
            for place in range(1, len(tokens))
        ]
        assert documents.nats[number] == pytest.approx(sum(nats), rel=1e-5)


def test_documents_trained_apart_are_evaluated_apart(folder: Path, runs: dict[str, Path]) -> None:
    """The first token after an end token alone, the others after their own document alone."""
    trained, found = evaluated(runs["packed_documents"], lines(folder, batches="packed_documents"), stride=8)
    documents = found.parts[0].documents
    assert documents is not None
    ids = encoded("a", trained.tokenizer)
    first = -log_probabilities(trained.model, [trained.tokenizer.end_id])[0, ids[0]].item()
    second = -log_probabilities(trained.model, ids[:1])[0, ids[1]].item()
    assert documents.nats[0] == pytest.approx(first + second, rel=1e-5)


def test_only_what_the_assistant_says_counts(folder: Path, runs: dict[str, Path]) -> None:
    _, found = evaluated(runs["padded"], talks(folder, batches="padded"), stride=4)
    documents = found.parts[0].documents
    assert documents is not None
    for number, talk in enumerate(TALKS):
        assert documents.num_targets[number] == sum(len(turn.encode()) + 1 for turn in talk[1::2])
    assert found.num_targets == found.text.num_targets


@pytest.mark.parametrize("stride", [0, -3, SEQ_LEN + 1])
def test_a_stride_out_of_range_is_refused(stride: int, folder: Path, runs: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=f"must lie between 1 and data.seq_len=16, got {stride}"):
        evaluated(runs["packed"], lines(folder), stride=stride)


# ------------------------------------------------------------------------------------------- as in training


@pytest.mark.parametrize("batches", ["packed", "packed_documents", "padded"])
@pytest.mark.parametrize("data", [lines, talks, pairs])
def test_documents_add_up(data: Callable[..., DataConfig], batches: str, folder: Path, runs: dict[str, Path]) -> None:
    trained, found = evaluated(runs[batches], data(folder, batches=batches))
    records = list(document_records(found, trained.tokenizer))
    assert [record["number"] for record in records] == list(range(found.text.num_documents))
    assert sum(record["tokens"] for record in records) == found.num_targets
    assert sum(record["tokens"] * (record["loss"] or 0) for record in records) == pytest.approx(found.nats, rel=1e-9)
    assert all((record["loss"] is None) == (record["tokens"] == 0) for record in records)
    assert found.metrics["all/loss"] == pytest.approx(found.nats / found.num_targets)
    assert found.metrics["all/perplexity"] == pytest.approx(math.exp(found.nats / found.num_targets))
    assert bool(found.note) == (found.num_targets < found.text.num_targets)


def test_a_stream_is_read_as_it_is_trained_on(folder: Path, runs: dict[str, Path]) -> None:
    """Windows over one document after another: a token belongs to its document, whatever comes before it."""
    trained, found = evaluated(runs["packed"], lines(folder))
    documents = found.parts[0].documents
    assert documents is not None
    ids = [encoded(text, trained.tokenizer) for text in TEXTS]
    stream, owners = list(itertools.chain(*ids)), np.repeat(np.arange(len(ids)), [len(one) for one in ids])
    nats = np.zeros(len(ids))
    for begin in range(0, len(stream) - 1, SEQ_LEN):
        table = log_probabilities(trained.model, stream[begin : begin + SEQ_LEN])
        for place, target in enumerate(stream[begin + 1 : begin + SEQ_LEN + 1]):
            nats[owners[begin + 1 + place]] -= table[place, target].item()
    assert documents.nats == pytest.approx(nats, rel=1e-5)
    assert documents.num_targets.tolist() == [len(one) - (number == 0) for number, one in enumerate(ids)]
    assert found.note == "the first token of a text is predicted from nothing"


def test_what_is_cut_or_left_out_is_told(folder: Path, runs: dict[str, Path]) -> None:
    """Of pairs whose source fills the row nothing counts, of a long target its beginning."""
    trained, found = evaluated(runs["padded"], pairs(folder, batches="padded"))
    records = list(document_records(found, trained.tokenizer))
    assert [record["tokens"] for record in records] == [6, 6, 0, 15]
    assert records[2]["loss"] is records[2]["bits_per_byte"] is None
    assert "left out as they have no target within data.seq_len=16 tokens: 1; cut to data.seq_len=16: 2" in found.note


# ------------------------------------------------------------------------------------------- bytes and texts


def test_documents_tell_their_bytes_and_how_they_begin(folder: Path, runs: dict[str, Path]) -> None:
    """Bytes are those of what counts: whole documents, targets of pairs, answers."""
    for data, expected, beginnings in (
        (lines(folder), [len(text.encode()) for text in TEXTS], [text[:60] for text in TEXTS]),
        (pairs(folder), [len(target.encode()) for _, target in PAIRS], [f"{s}\n{t}" for s, t in PAIRS]),
        (
            talks(folder),
            [sum(len(turn.encode()) for turn in talk[1::2]) for talk in TALKS],
            ["\n".join(talk)[:60] for talk in TALKS],
        ),
    ):
        trained, found = evaluated(runs["packed"], data, stride=16)
        records = list(document_records(found, trained.tokenizer))
        assert [record["bytes"] for record in records] == expected
        assert [record["text"] for record in records] == beginnings
        assert summary(found)["bytes"] == sum(expected)
        nats = sum(record["loss"] * record["tokens"] for record in records)
        bits = sum(record["bits_per_byte"] * record["bytes"] for record in records)
        assert bits == pytest.approx(nats / math.log(2))
        assert found.metrics["all/bits_per_byte"] == pytest.approx(bits / sum(expected))


def test_sources_of_a_mixture_are_told_apart(folder: Path, runs: dict[str, Path]) -> None:
    sources: dict[str, DataConfig] = {
        "a": lines(folder),
        "b": TextConfig(path=str(folder / "pairs.jsonl"), **common(folder, {})),
    }
    _, both = evaluated(runs["packed"], MixtureConfig(sources=sources, **common(folder, {})))
    found = summary(both)
    records = list(document_records(both, ByteTokenizer()))
    assert [record["source"] for record in records] == ["a"] * len(TEXTS) + ["b"]
    for name, data in sources.items():
        _, alone = evaluated(runs["packed"], data)
        own = found["sources"][name]
        assert own["counted"] == alone.num_targets
        assert own["documents"] == alone.text.num_documents
        assert {key: own[key] for key in alone.metrics} == pytest.approx(alone.metrics, rel=1e-6)
    nats = sum(own["counted"] * own["all/loss"] for own in found["sources"].values())
    assert found["all/loss"] == pytest.approx(nats / found["counted"])


# ------------------------------------------------------------------------------------------- which text


def test_other_text_is_whole_and_splits_are_made_if_asked_for(folder: Path, runs: dict[str, Path]) -> None:
    run, decode = runs["packed"], loaded(runs["packed"]).tokenizer.decode
    _, whole = opened(run, lines(folder, document="file"))
    assert (whole.split, whole.num_documents) == ("all", 1)
    assert decode(whole.parts[0].documents[0].ids.tolist()) == "\n".join(LINES)
    halves = [opened(run, lines(folder, split="document"), split)[1].num_documents for split in ("train", "val")]
    assert halves == [len(TEXTS) - 1, 1]
    with pytest.raises(DataError, match=r"has no test split; there are train, val, all$"):
        opened(run, lines(folder), "test")


def test_a_validation_split_of_its_own_is_taken(folder: Path, runs: dict[str, Path]) -> None:
    data = lines(folder, val_path=str(folder / "pairs.jsonl"))
    assert opened(runs["packed"], data)[1].split == "val"
    _, everything = opened(runs["packed"], data, "all")
    assert [part.split for part in everything.parts] == ["train", "val"]
    assert everything.num_documents == len(TEXTS) + len(PAIRS)
    trained, found = evaluated(runs["packed"], data)
    assert "split" not in next(document_records(found, trained.tokenizer))
    settings, text = opened(runs["packed"], data, "all")
    both = evaluate_text(trained, settings, text, choose_precision(trained), per_document=True)
    splits = [record["split"] for record in document_records(both, trained.tokenizer)]
    assert splits == ["train"] * len(TEXTS) + ["val"] * len(PAIRS)


def test_text_is_read_with_the_run_s_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Whatever the run's settings would train; a character it does not know is refused."""
    run = make_run(tmp_path / "run", CharTokenizer("abcdefghijklmnopqrstuvwxyzü "), "tokenizer=char")
    _, text = opened(run, lines(folder))
    assert loaded(run).tokenizer.decode(text.parts[0].documents[0].ids.tolist()) == TEXTS[0]
    with pytest.raises(DataError, match=r"the character '.n' \(U\+000A\) does not occur"):
        opened(run, lines(folder, document="file"))


def test_a_text_prepared_with_another_tokenizer_is_prepared_again(folder: Path, tmp_path: Path) -> None:
    """Another run of the same settings has made one of that text."""
    run = make_run(tmp_path / "run", CharTokenizer("zyxwvutsrqponmlkjihgfedcbaü "), "tokenizer=char")
    prepare(lines(folder, split="document"), loaded(run).config.tokenizer)
    _, text = opened(run, lines(folder, split="document"), "train")
    documents = text.parts[0].documents
    texts = [loaded(run).tokenizer.decode(documents[number].ids.tolist()) for number in range(len(documents))]
    assert set(texts) < set(TEXTS)


def test_ids_without_a_tokenizer_can_only_be_evaluated_on_ids(folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", IdsTokenizer(50, 49), "tokenizer=ids", "tokenizer.vocab_size=50")
    with pytest.raises(DataError, match="trained on ids alone, without a tokenizer to read text with"):
        opened(run, lines(folder))
    np.save(tmp_path / "ids.npy", np.array([*range(30), 49, *range(9), 49], np.uint16))
    trained, found = evaluated(run, TokensConfig(path=str(tmp_path / "ids.npy"), **common(folder, {})))
    assert (found.text.num_documents, found.num_targets) == (2, 40)
    assert found.metrics.keys() == {"all/loss", "all/perplexity"}
    records = list(document_records(found, trained.tokenizer))
    assert [record["bits_per_byte"] for record in records] == [None, None]
    assert "bytes" not in summary(found)


def test_references_are_the_text_itself(folder: Path, tmp_path: Path) -> None:
    """Not what a tokenizer that changes text makes of it."""
    library = Library.from_str(foreign_huggingface().to_str())  # a copy: the other is everybody's
    library.normalizer = normalizers.Replace("a", "")
    run = make_run(tmp_path / "run", adopt_huggingface(library.to_str().encode(), None, []))
    _, text = opened(run, pairs(folder))
    assert [(pair.source, pair.target) for pair in text.pairs(text.parts[0])] == PAIRS


# ------------------------------------------------------------------------------------------- memory and formats


def test_batches_that_do_not_fit_are_read_in_parts(
    folder: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, whole = evaluated(runs["packed"], lines(folder))
    room = 1

    def measure_in_little_room(*args: Any) -> Tensor:
        if args[-1] > room:
            raise torch.OutOfMemoryError("there is no more")
        return measure(*args)

    monkeypatch.setattr(evaluation_module, "measure", measure_in_little_room)
    _, parts = evaluated(runs["packed"], lines(folder))
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)
    assert [record.message for record in caplog.records] == [
        "out of memory with 3 sequences at a time, going on with 2",
        "out of memory with 2 sequences at a time, going on with 1",
    ]
    room = 0
    with pytest.raises(HardwareError, match="one sequence does not fit into the memory of device=cpu"):
        evaluated(runs["packed"], lines(folder))


def test_main_memory_is_not_asked_for_more_than_there_is(
    folder: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def noted(*args: Any) -> Tensor:
        sizes.append(args[-1])
        return measure(*args)

    monkeypatch.setattr(evaluation_module, "measure", noted)
    evaluated(runs["packed"], lines(folder))
    monkeypatch.setattr(evaluation_module, "available_memory", lambda: 1.0)
    evaluated(runs["packed"], lines(folder))
    assert set(sizes) == {3, 1}


def test_the_format_is_fp32_unless_asked_for(runs: dict[str, Path]) -> None:
    trained = load_model(runs["packed"])
    assert choose_precision(trained).name == "fp32"
    config = replace(trained.config, precision=replace(trained.config.precision, format="bf16"))
    assert choose_precision(replace(trained, config=config)).name == "fp32"
    assert choose_precision(trained, "bf16").name == "bf16"
    with pytest.raises(HardwareError, match="precision=fp16 needs a CUDA device"):
        choose_precision(trained, "fp16")
