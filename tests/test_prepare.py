"""Prepared data: the split loses and leaks nothing, the cache is built once and never half."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmtrain.config.schema import (
    ByteConfig,
    CharConfig,
    MixtureConfig,
    PairsConfig,
    PythonStdlibConfig,
    SavedTokenizerConfig,
    SentencePieceBpeConfig,
    TextConfig,
    TokenizerConfig,
)
from lmtrain.data import entry as entry_module
from lmtrain.data import prepare as prepare_module
from lmtrain.data.cache import cache_folder
from lmtrain.data.documents import Documents
from lmtrain.data.prepare import find_prepared, prepare
from lmtrain.data.prepared import PreparedData, SplitName
from lmtrain.data.tokenizer import ByteTokenizer
from lmtrain.errors import DataError


def some_lines(num_lines: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()  # noqa: SIM905
    return [f"{number} " + " ".join(generator.choices(words, k=6)) for number in range(num_lines)]


def write(config: TextConfig, text: str) -> None:
    Path(str(config.path)).write_text(text, encoding="utf-8")


@pytest.fixture
def config(tmp_path: Path) -> TextConfig:
    """A corpus of 100 different one-line documents."""
    (tmp_path / "text.txt").write_text("\n".join(some_lines(100)))
    return TextConfig(seq_len=8, path=str(tmp_path / "text.txt"), document="line", cache_dir=str(tmp_path / "cache"))


def documents(prepared: PreparedData, split: SplitName) -> Documents:
    (found,) = prepared.documents(split)
    return found


def texts_in(prepared: PreparedData, split: SplitName) -> list[str]:
    """Each document decoded, with a full stop where the end token follows."""
    found = documents(prepared, split)
    ids = [found[number].ids.tolist() for number in range(len(found))]
    end = prepared.tokenizer.end_id
    return [prepared.tokenizer.decode(one) + ("." if one[-1] == end else "") for one in ids]


def entries(config: TextConfig) -> list[str]:
    assert config.cache_dir is not None
    return sorted(path.name for path in (Path(config.cache_dir) / "prepared").iterdir() if path.is_dir())


# ----------------------------------------------------------------------------------------- split


@pytest.mark.parametrize(
    "tokenizer",
    [ByteConfig(), CharConfig(), SentencePieceBpeConfig(vocab_size=300)],
    ids=lambda t: type(t).__name__,
)
def test_nothing_is_lost_and_nothing_leaks(config: TextConfig, tokenizer: TokenizerConfig) -> None:
    prepared = prepare(config, tokenizer)
    (source,) = prepared.sources
    train, val = texts_in(prepared, "train"), texts_in(prepared, "val")
    assert sorted(train + val) == sorted(line + "." for line in some_lines(100))
    assert not set(train) & set(val)
    assert (len(train), len(val)) == (90, 10)
    for split, texts in (("train", train), ("val", val)):
        assert source.splits[split].num_bytes == sum(len(text.encode()) - 1 for text in texts)  # type: ignore[index]
        assert documents(prepared, split).tokens.dtype == np.uint16  # type: ignore[arg-type]
    assert source.duplicates == 0
    assert set(source.left_out.values()) == {0}
    assert prepared.bytes_per_target("val") == source.splits["val"].num_bytes / len(documents(prepared, "val").tokens)


def test_the_tail_of_one_document_is_its_last_characters(config: TextConfig) -> None:
    text = "".join(some_lines(300)) + "äöü€" * 25
    write(config, text)
    prepared = prepare(replace(config, document="file"), CharConfig())
    cut = int(len(text) * 0.9)
    assert texts_in(prepared, "train") == [text[:cut]], "the document goes on in the validation text"
    assert texts_in(prepared, "val") == [text[cut:] + "."]
    assert prepared.sources[0].splits["val"].num_bytes == len(text[cut:].encode())
    with_test = prepare(replace(config, document="file", test_fraction=0.2), CharConfig())
    assert texts_in(with_test, "test") == [text[int(len(text) * 0.8) :] + "."]


def test_the_tail_of_several_documents_keeps_their_order(tmp_path: Path, config: TextConfig) -> None:
    texts = ["a" * 50, "b" * 30, "c" * 20, "d" * 100]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.in").write_text(text)
    several = replace(config, path=str(tmp_path / "*.in"), document="file", val_fraction=0.55)
    prepared = prepare(several, ByteConfig())
    assert texts_in(prepared, "train") == ["a" * 50 + ".", "b" * 30 + ".", "c" * 10]
    assert texts_in(prepared, "val") == ["c" * 10 + ".", "d" * 100 + "."]


def test_without_making_splits_the_text_is_whole(config: TextConfig, tmp_path: Path) -> None:
    """Neither divided by documents nor cut; a split that the data have stays apart."""
    assert texts_in(prepare(config, ByteConfig(), make_splits=False), "train") == [f"{x}." for x in some_lines(100)]
    one = replace(config, document="file", val_fraction=0.3, test_fraction=0.3)
    whole = prepare(one, ByteConfig(), make_splits=False)
    assert set(whole.sources[0].splits) == {"train"}
    assert texts_in(whole, "train") == ["\n".join(some_lines(100)) + "."]
    assert set(prepare(one, ByteConfig()).sources[0].splits) == {"train", "val", "test"}
    given = replace(config, val_path=str(tmp_path / "val.txt"), test_fraction=0.5)
    (tmp_path / "val.txt").write_text("one\ntwo\n")
    apart = prepare(given, ByteConfig(), make_splits=False)
    assert set(apart.sources[0].splits) == {"train", "val"}
    assert texts_in(apart, "val") == ["one.", "two."]
    assert len(texts_in(apart, "train")) == 100


def test_a_text_too_small_to_divide_can_be_whole(config: TextConfig) -> None:
    write(config, "a")
    with pytest.raises(DataError, match="too little to train and to validate"):
        prepare(config, ByteConfig())
    assert texts_in(prepare(config, ByteConfig(), make_splits=False), "train") == ["a."]


def test_what_is_in_the_cache_is_found_and_nothing_built(config: TextConfig) -> None:
    assert find_prepared(config, ByteConfig()) is None
    prepare(config, ByteConfig(), make_splits=False)
    assert find_prepared(config, ByteConfig()) is None
    built = prepare(config, ByteConfig())
    found = find_prepared(config, ByteConfig())
    assert found is not None
    assert (found.fingerprint, found.sources[0].built) == (built.fingerprint, False)
    assert find_prepared(config, CharConfig()) is None
    with pytest.raises(DataError):
        find_prepared(replace(config, path="nowhere"), ByteConfig())


def test_a_saved_tokenizer_has_an_entry_wherever_it_lies(config: TextConfig, tmp_path: Path) -> None:
    trained = prepare(config, SentencePieceBpeConfig(vocab_size=300))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        trained.tokenizer.save(tmp_path / name / "tokenizer.model")
    saved = [prepare(config, SavedTokenizerConfig(path=str(tmp_path / name))) for name in ("one", "two")]
    assert [one.sources[0].built for one in saved] == [True, False]
    assert saved[0].tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert texts_in(saved[0], "val") == texts_in(trained, "val")
    assert np.array_equal(documents(saved[0], "train").tokens, documents(trained, "train").tokens)


def test_what_is_left_out_is_counted(config: TextConfig) -> None:
    write(config, "\n".join([*some_lines(30), *some_lines(5), "x", "", "yy"]))
    (source,) = prepare(replace(config, min_chars=3, deduplicate=True), ByteConfig()).sources
    assert source.left_out == {"shorter than data.min_chars=3": 2, "equal to an earlier one (data.deduplicate)": 5}
    assert source.duplicates == 5
    assert sum(len(split.documents) for split in source.splits.values()) == 30


def test_the_bpe_tokenizer_sees_training_text_only(config: TextConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(tokenizer: TokenizerConfig, lines: list[str], characters: str, special: list[str]) -> object:
        seen[:] = lines
        return train(tokenizer, lines, characters, special)

    train = entry_module.train_tokenizer
    monkeypatch.setattr(entry_module, "train_tokenizer", spy)
    prepared = prepare(config, SentencePieceBpeConfig(vocab_size=300))
    assert [line + "." for line in seen] == texts_in(prepared, "train")
    write(config, "".join(some_lines(300)))
    prepared = prepare(replace(config, document="file"), SentencePieceBpeConfig(vocab_size=300))
    assert "".join(seen) == texts_in(prepared, "train")[0], "not the end of a document that is cut"


def test_a_large_vocabulary_is_stored_in_32_bits(config: TextConfig) -> None:
    write(config, "".join(chr(0x20000 + number) for number in range(66_000)))
    prepared = prepare(replace(config, document="file"), CharConfig())
    train, val = (documents(prepared, split).tokens for split in ("train", "val"))  # type: ignore[arg-type]
    assert train.dtype == np.uint32
    assert train.max() > 1 << 15
    assert len(train) + len(val) == 66_001


# ----------------------------------------------------------------------------------------- cache


def test_the_second_call_finds_the_first_ones_data(config: TextConfig) -> None:
    messages: list[str] = []
    first = prepare(config, ByteConfig(), messages.append)
    assert first.sources[0].built
    assert messages[0] == f"preparing {config.path}: this text is not in the cache"
    assert "tokenising: 100%" in messages
    messages.clear()
    second = prepare(config, ByteConfig(), messages.append)
    assert not second.sources[0].built
    assert not messages
    assert second.fingerprint == first.fingerprint
    for split in ("train", "val"):
        assert texts_in(second, split) == texts_in(first, split)  # type: ignore[arg-type]
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.sources[0].left_out == first.sources[0].left_out


def test_why_data_are_prepared_again_is_told(config: TextConfig) -> None:
    messages: list[str] = []
    prepare(config, SentencePieceBpeConfig(vocab_size=300))
    prepare(replace(config, min_chars=2), SentencePieceBpeConfig(vocab_size=310), messages.append)
    assert messages[0].endswith(": the cache has it with another data.min_chars, tokenizer.vocab_size")
    prepare(replace(config, min_chars=3), SentencePieceBpeConfig(vocab_size=310), messages.append)
    assert any(message.endswith(": the cache has it with another data.min_chars") for message in messages)


def test_a_key_follows_what_changes_the_tokens(
    tmp_path: Path, config: TextConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints = [
        prepare(other, tokenizer).fingerprint
        for other, tokenizer in [
            (config, ByteConfig()),
            (config, CharConfig()),
            (replace(config, val_fraction=0.2), ByteConfig()),
            (replace(config, split="tail"), ByteConfig()),
            (replace(config, min_chars=2), ByteConfig()),
            (replace(config, max_documents=50), ByteConfig()),
            (replace(config, document="paragraph"), ByteConfig()),
            (replace(config, deduplicate=True), ByteConfig()),
            (replace(config, test_fraction=0.1), ByteConfig()),
        ]
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert prepare(replace(config, seq_len=99), ByteConfig()).fingerprint == fingerprints[0]
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(str(config.path)).read_bytes())
    assert not prepare(replace(config, path=str(copy)), ByteConfig()).sources[0].built
    copy.write_text(copy.read_text() + "\nmore")
    assert prepare(replace(config, path=str(copy)), ByteConfig()).sources[0].built
    monkeypatch.setattr(prepare_module, "PREPARE_VERSION", -1)
    assert prepare(config, ByteConfig()).sources[0].built


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "named"))
    assert cache_folder(PythonStdlibConfig(seq_len=8)) == tmp_path / "named"
    assert cache_folder(PythonStdlibConfig(seq_len=8, cache_dir="~/mine")) == Path.home() / "mine"
    monkeypatch.delenv("LMTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "lmtrain" in cache_folder(PythonStdlibConfig(seq_len=8)).parts


def test_a_damaged_entry_is_built_again(config: TextConfig, caplog: pytest.LogCaptureFixture) -> None:
    first = prepare(config, CharConfig())
    expected, folder = texts_in(first, "train"), first.sources[0].folder
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", "tokenizer.model", "train.ends", "train.tokens", "val.ends", "val.tokens"]
    for name in names:
        content = (folder / name).read_bytes()
        for damaged in (content[:-4], bytes([content[0] ^ 1]) + content[1:], None):
            (folder / name).unlink()
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                again = prepare(config, CharConfig())
            assert again.sources[0].built
            assert len(caplog.records) == 1
            assert "damaged" in caplog.text
            assert texts_in(again, "train") == expected
    assert not prepare(config, CharConfig()).sources[0].built


@pytest.mark.parametrize("tokenizer", [SentencePieceBpeConfig(vocab_size=60_000), ByteConfig()])
def test_a_failed_build_leaves_nothing(config: TextConfig, tokenizer: TokenizerConfig) -> None:
    def fail(message: str) -> None:
        if message.startswith("tokenising"):
            raise DataError("larger")

    with pytest.raises(DataError, match="larger"):
        prepare(config, tokenizer, fail)
    assert entries(config) == []


def test_an_unwritable_cache(tmp_path: Path, config: TextConfig) -> None:
    with pytest.raises(DataError, match=r"cannot write prepared data to .*data\.cache_dir"):
        prepare(replace(config, cache_dir=str(tmp_path / "text.txt" / "below")), ByteConfig())


def test_text_that_changes_meanwhile_is_noticed(config: TextConfig) -> None:
    def change(message: str) -> None:
        if message.startswith("tokenising"):
            write(config, "\n".join(some_lines(90, seed=1)))

    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare(config, ByteConfig(), change)
    assert entries(config) == []


def test_a_warm_start_on_the_standard_library_is_fast(tmp_path: Path) -> None:
    config = PythonStdlibConfig(seq_len=8, max_documents=30, cache_dir=str(tmp_path))
    prepare(config, ByteConfig())
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert not prepare(config, ByteConfig()).sources[0].built
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


# ----------------------------------------------------------------------------------------- several sources


@pytest.fixture
def mixture(tmp_path: Path, config: TextConfig) -> MixtureConfig:
    (tmp_path / "other.txt").write_text("\n".join(f"zwei {number} öl" for number in range(50)))
    other = replace(config, path=str(tmp_path / "other.txt"), weight=3.0, val_fraction=0.2)
    return MixtureConfig(seq_len=8, cache_dir=config.cache_dir, sources={"one": config, "other": other})


def test_sources_of_a_mixture_share_a_tokenizer(mixture: MixtureConfig) -> None:
    prepared = prepare(mixture, CharConfig())
    assert [source.weight for source in prepared.sources] == [1.0, 3.0]
    assert [[len(one) for one in prepared.documents(split)] for split in ("train", "val")] == [[90, 40], [10, 10]]  # type: ignore[arg-type]
    assert prepared.tokenizer.decode(prepared.tokenizer.encode("öl alpha")) == "öl alpha"
    assert len({source.fingerprint for source in prepared.sources}) == 2
    one, other = (source.splits["val"] for source in prepared.sources)
    num_targets = one.documents.num_targets + other.documents.num_targets
    assert prepared.bytes_per_target("val") == (one.num_bytes + other.num_bytes) / num_targets
    assert prepared.documents("test") == []


def test_weights_change_the_fingerprint_and_no_token(mixture: MixtureConfig) -> None:
    first = prepare(mixture, ByteConfig())
    heavier = replace(mixture.sources["one"], weight=7.0)
    again = prepare(replace(mixture, sources=mixture.sources | {"one": heavier}), ByteConfig())
    assert not again.sources[0].built
    assert again.sources[0].fingerprint == first.sources[0].fingerprint
    assert again.fingerprint != first.fingerprint


def test_answers_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"de": f"Satz {n}", "en": f"sentence {n}"}) + "\n" for n in range(40)))
    pairs = PairsConfig(seq_len=8, path=str(path), source="de", target="en", cache_dir=str(tmp_path / "cache"))
    found = documents(prepare(pairs, ByteConfig()), "train")
    assert found.prompts is not None
    assert found.counted is not None
    first = found[0].ids.tolist()
    assert first[found.prompts[0] - 1] == ByteTokenizer.end_id
    assert ByteTokenizer().decode(first[: found.prompts[0]]).startswith("Satz ")
    assert found.num_targets < len(found.tokens)
    assert documents(prepare(replace(pairs, targets="all"), ByteConfig()), "train").counted is None


# ------------------------------------------------------------------------------- several processes

SCRIPT = textwrap.dedent("""
    import os, signal, sys
    from lmtrain.config.schema import SentencePieceBpeConfig, TextConfig
    from lmtrain.data.prepare import prepare

    path, cache, dies = sys.argv[1:]

    def on_progress(message):
        if dies == "dies" and message.startswith("tokenising"):
            os.kill(os.getpid(), signal.SIGKILL)

    data = TextConfig(seq_len=8, path=path, document="line", cache_dir=cache)
    prepared = prepare(data, SentencePieceBpeConfig(vocab_size=300), on_progress)
    (train,) = prepared.documents("train")
    print(prepared.sources[0].built, prepared.fingerprint, len(train.tokens), int(train.tokens.sum()))
""")


def start(config: TextConfig, dies: str = "lives") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(config.path), str(config.cache_dir), dies]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.multiprocess
def test_eight_processes_build_once(config: TextConfig) -> None:
    write(config, "\n".join(some_lines(20_000)))
    processes = [start(config) for _ in range(8)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert Counter(built for built, *_ in answers) == {"True": 1, "False": 7}
    assert len({tuple(rest) for _, *rest in answers}) == 1
    assert len(entries(config)) == 1


@pytest.mark.multiprocess
def test_a_killed_build_is_gone_on_with(config: TextConfig) -> None:
    process = start(config, "dies")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (draft,) = entries(config)
    assert draft.endswith(".draft")
    left = {path.name for path in (Path(str(config.cache_dir)) / "prepared" / draft).iterdir()}
    assert "tokenizer.model" in left
    (source,) = prepare(config, SentencePieceBpeConfig(vocab_size=300)).sources
    assert source.built
    assert entries(config) == [source.fingerprint]
    assert not [path.name for path in source.folder.iterdir() if path.name.startswith(".")]
    other = prepare(replace(config, cache_dir=f"{config.cache_dir}2"), SentencePieceBpeConfig(vocab_size=300))
    sums = [{path.name: path.read_bytes() for path in one.folder.iterdir()} for one in (source, other.sources[0])]
    assert sums[0] == sums[1], "as if nobody had killed it"
