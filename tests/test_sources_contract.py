"""What every corpus keeps, whatever it is made of: the same records each time, a fingerprint of them, its splits."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lmtrain.config.schema import ChatConfig, FilesConfig, PairsConfig, RecordsConfig, TextConfig, TokensConfig
from lmtrain.data.records import Conversation, Message, Pair
from lmtrain.data.sources import Corpus, open_corpus
from lmtrain.errors import DataError


def in_json(name: str) -> bytes:
    return "".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(5)).encode()


def in_table(name: str) -> bytes:
    return b"id,text\n" + b"".join(b"%d,%s %d\n" % (number, name.encode(), number) for number in range(5))


def in_parquet(name: str) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{name} {number}" for number in range(5)]}), out)
    return out.getvalue()


def in_arrow(name: str) -> bytes:
    out = io.BytesIO()
    table = pyarrow.table({"text": [f"{name} {number}" for number in range(5)]})
    with pyarrow.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    return out.getvalue()


def in_turns(name: str) -> bytes:
    turns = [{"role": "user", "content": name}, {"role": "assistant", "content": "yes"}]
    return (json.dumps({"messages": turns}) + "\n").encode() * 5


def in_array(name: str) -> bytes:
    out = io.BytesIO()
    np.save(out, np.frombuffer(name.encode(), np.uint8).astype(np.uint16))
    return out.getvalue()


def texts(name: str) -> list[object]:
    return [f"{name} {number}" for number in range(5)]


def ids(name: str) -> list[object]:
    return [list(name.encode())]


@dataclass(frozen=True)
class Kind:
    """A kind of corpus: a file of it that has records of this name, and what they are."""

    suffix: str
    content: Callable[[str], bytes]
    records: Callable[[str], list[object]]
    config: type[FilesConfig] = RecordsConfig
    settings: tuple[tuple[str, object], ...] = ()

    def write(self, path: Path, name: str) -> Path:
        """A file, and what belongs to it."""
        path = path.with_name(path.name + self.suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content(name))
        if self.suffix == ".de":
            path.with_suffix(".en").write_text("english\n" * 5)
        return path

    def open(self, path: Path | str | None, **settings: object) -> Corpus:
        """The corpus of a path."""
        place = None if path is None else str(path)
        return open_corpus(self.config(seq_len=8, path=place, **(dict(self.settings) | settings)))  # type: ignore[arg-type]


def lines(name: str) -> bytes:
    return "".join(f"{name} {number}\n" for number in range(5)).encode()


ONE_LINE = (("document", "line"),)
KINDS = {
    "text": Kind(".txt", str.encode, lambda name: [name], TextConfig),
    "lines": Kind(".txt", lines, texts, TextConfig, ONE_LINE),
    "paragraphs": Kind(
        ".txt", lambda name: lines(name).replace(b"\n", b"\n \n"), texts, TextConfig, (("document", "paragraph"),)
    ),
    "gzip": Kind(".txt.gz", lambda name: gzip.compress(lines(name), mtime=0), texts, TextConfig, ONE_LINE),
    "zstd": Kind(".txt.zst", lambda name: zstandard.compress(lines(name)), texts, TextConfig, ONE_LINE),
    "jsonl": Kind(".jsonl", in_json, texts),
    "ndjson.gz": Kind(".ndjson.gz", lambda name: gzip.compress(in_json(name), mtime=0), texts),
    "json": Kind(".json", lambda name: json.dumps([{"text": text} for text in texts(name)], indent=1).encode(), texts),
    "csv": Kind(".csv", in_table, texts),
    "csv.zst": Kind(".csv.zst", lambda name: zstandard.compress(in_table(name)), texts),
    "tsv": Kind(".tsv", lambda name: in_table(name).replace(b",", b"\t"), texts),
    "parquet": Kind(".parquet", in_parquet, texts),
    "parquet.gz": Kind(".parquet.gz", lambda name: gzip.compress(in_parquet(name), mtime=0), texts),
    "arrow": Kind(".arrow", in_arrow, texts),
    "chat": Kind(
        ".jsonl",
        in_turns,
        lambda name: [Conversation((Message("user", name), Message("assistant", "yes")))] * 5,
        ChatConfig,
    ),
    "pairs": Kind(
        ".csv",
        in_table,
        lambda name: [Pair(f"{number}", f"<{name} {number}>") for number in range(5)],
        PairsConfig,
        (("source", "id"), ("target", "<{text}>")),
    ),
    "aligned": Kind(
        ".de",
        lines,
        lambda name: [Pair(f"{name} {number}", "english") for number in range(5)],
        PairsConfig,
        (("source", "de"), ("target", "en")),
    ),
    "npy": Kind(".npy", in_array, ids, TokensConfig),
    "bin": Kind(".bin", lambda name: np.array(list(name.encode()), np.uint16).tobytes(), ids, TokensConfig),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def read(corpus: Corpus, split: str = "train") -> list[object]:
    found = list(corpus.records(split))  # type: ignore[arg-type]
    return [record.tolist() if isinstance(record, np.ndarray) else record for record in found]


def test_records_are_the_same_each_time(tmp_path: Path, kind: Kind) -> None:
    corpus = kind.open(kind.write(tmp_path / "one", "one"))
    assert read(corpus) == read(corpus) == kind.records("one")
    assert corpus.splits == ("train",)
    assert corpus.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    first, second = corpus.records(), corpus.records()  # two readings at once do not disturb each other
    assert len(list(itertools.zip_longest(first, second))) == len(kind.records("one"))


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path, kind: Kind) -> None:
    cache = tmp_path / "cache"
    one = kind.write(tmp_path / "one", "one")
    elsewhere = kind.write(tmp_path / "other folder" / "other name", "one")
    fingerprint = kind.open(one).fingerprint(cache)
    assert kind.open(elsewhere).fingerprint(cache) == fingerprint
    kind.write(tmp_path / "one", "two")
    assert kind.open(one).fingerprint(cache) != fingerprint


def test_a_fingerprint_follows_the_splits_of_the_same_files(tmp_path: Path, kind: Kind) -> None:
    kind.write(tmp_path / "all" / "a", "one")
    kind.write(tmp_path / "all" / "b", "two")
    kind.write(tmp_path / "split" / "train", "one")
    kind.write(tmp_path / "split" / "valid", "two")
    together, split = kind.open(tmp_path / "all"), kind.open(tmp_path / "split")
    assert read(together) == read(split) + read(split, "val")
    assert together.fingerprint(tmp_path / "cache") != split.fingerprint(tmp_path / "cache")


def test_the_same_bytes_in_another_format_are_another_corpus(tmp_path: Path) -> None:
    path = KINDS["csv"].write(tmp_path / "one", "one")
    one, other = KINDS["csv"].open(path), KINDS["tsv"].open(shutil.copy(path, tmp_path / "one.tsv"))
    assert one.fingerprint(tmp_path / "cache") != other.fingerprint(tmp_path / "cache")


def test_names_of_files_tell_the_splits(tmp_path: Path, kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "train-1", "dev", "my_test.2016", "notes", "trainings"):
        kind.write(tmp_path / name, name)
    with caplog.at_level("INFO"):
        corpus = kind.open(tmp_path)
    assert corpus.splits == ("train", "val", "test")
    assert sorted(map(str, read(corpus))) == sorted(map(str, kind.records("train") + kind.records("train-1")))
    assert read(corpus, "val") == kind.records("dev")
    assert read(corpus, "test") == kind.records("my_test.2016")
    assert f"not used: notes{kind.suffix}, trainings{kind.suffix}" in caplog.text


def test_names_of_folders_tell_the_splits(tmp_path: Path, kind: Kind) -> None:
    for name in ("data/train/a", "data/train/test", "data/validation/a", "other"):
        kind.write(tmp_path / name, name)
    corpus = kind.open(tmp_path)
    assert corpus.splits == ("train", "val")
    assert read(corpus) == kind.records("data/train/a") + kind.records("data/train/test")
    assert read(corpus, "val") == kind.records("data/validation/a")


def test_without_training_files_the_names_say_nothing(tmp_path: Path, kind: Kind) -> None:
    kind.write(tmp_path / "a", "a")
    kind.write(tmp_path / "test", "test")
    corpus = kind.open(tmp_path)
    assert corpus.splits == ("train",)
    assert read(corpus) == kind.records("a") + kind.records("test")


def test_paths_name_splits(tmp_path: Path, kind: Kind) -> None:
    for name in ("a", "b", "c", "d"):
        kind.write(tmp_path / name, name)
    corpus = kind.open(tmp_path, val_path=f"{tmp_path}/b{kind.suffix}", test_path=str(tmp_path / f"[c]{kind.suffix}"))
    assert corpus.splits == ("train", "val", "test")
    assert read(corpus) == kind.records("a") + kind.records("d")  # what validates is not trained on
    assert read(corpus, "val") == kind.records("b")
    assert read(corpus, "test") == kind.records("c")
    with pytest.raises(DataError, match="none is left to train on"):
        kind.open(tmp_path / f"a{kind.suffix}", val_path=f"{tmp_path}/../{tmp_path.name}/a{kind.suffix}")
    with pytest.raises(DataError, match=r"data\.test_path=nowhere: no such file"):
        kind.open(tmp_path, test_path="nowhere")


def test_a_file_that_went_away(tmp_path: Path, kind: Kind) -> None:
    path = kind.write(tmp_path / "one", "one")
    corpus = kind.open(path)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*one.*: No such file or directory"):
        read(corpus)
    with pytest.raises(DataError, match="No such file"):
        corpus.fingerprint(tmp_path / "cache")


def test_an_empty_file_alone_is_refused_and_among_others_no_record(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / f"a{kind.suffix}"
    path.write_bytes(b"")
    path.with_suffix(".en").write_bytes(b"")
    with pytest.raises(DataError, match="empty, there is no text in it"):
        kind.open(path)
    if kind.suffix in (".txt", ".jsonl", ".json", ".csv", ".tsv", ".bin", ".de"):  # other formats have a header
        kind.write(tmp_path / "b", "b")
        assert read(kind.open(tmp_path)) == kind.records("b")


def test_a_folder_that_holds_none(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(DataError, match="there are no files in this folder"):
        kind.open(tmp_path)
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(DataError, match=r"in this folder, but \.pdf \(1\)"):
        kind.open(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    kind.write(tmp_path / "a", "a")

    def denied(place: object, onerror: Callable[[OSError], None]) -> object:
        onerror(PermissionError(13, "Permission denied", f"{place}/secret"))
        raise AssertionError("went on")

    monkeypatch.setattr("os.walk", denied)
    with pytest.raises(DataError, match=r"cannot read .*secret: Permission denied"):
        kind.open(tmp_path)
