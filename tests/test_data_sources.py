"""Which files a corpus has, which documents they hold, and what unusable text is answered with."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lmtrain.config.schema import DataConfig, PythonStdlibConfig, TextConfig
from lmtrain.data.sources import Corpus, open_corpus
from lmtrain.data.sources.files import LocalFile
from lmtrain.data.sources.text import TextReader
from lmtrain.errors import DataError


def text_config(path: Path | str, **settings: object) -> TextConfig:
    return TextConfig(seq_len=8, path=str(path), **settings)  # type: ignore[arg-type]


def documents(path: Path | str, **settings: object) -> list[str]:
    return list(open_corpus(text_config(path, **settings)).records())  # type: ignore[arg-type]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_stdlib_holds_source_files_and_no_tests_or_installed_packages() -> None:
    corpus = open_corpus(PythonStdlibConfig(seq_len=8))
    files = [file.local() for reader in corpus.readers["train"] for file in reader.files]
    assert len(files) > 300
    assert files == sorted(files)
    assert any(path.name == "argparse.py" for path in files)
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not any(excluded.intersection(path.parts) for path in files)
    argparse = Path(__import__("argparse").__file__).read_bytes().decode()
    assert argparse in corpus.records()


def test_a_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    text = "first\r\n\r\n  second\rthird\n\n"
    assert documents(write(tmp_path / "a.txt", text)) == [text]


def test_a_leading_byte_order_mark_is_dropped_a_later_one_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\n\xef\xbb\xbftwo")
    assert documents(path) == ["one\n\ufefftwo"]
    assert documents(path, document="line") == ["one", "\ufefftwo"]


def test_lines_and_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\r\n two\r\n\r\n \nthree\n\n\nfour")
    assert documents(path, document="line") == ["one", " two", "three", "four"]
    assert documents(path, document="paragraph") == ["one\r\n two", "three", "four"]


def test_a_folder_gives_every_txt_file_below_it_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.md", "c/d/e.txt"):
        write(tmp_path / name, name)
    assert documents(tmp_path) == ["a/z.txt", "b.txt", "c/d/e.txt"]


def test_a_glob_gives_its_matches_in_order(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.md", "a/y.txt"):
        write(tmp_path / name, name)
    assert documents(tmp_path / "**" / "*.md") == ["a/z.md", "b.md"]
    assert documents(tmp_path / "?.md") == ["b.md"]


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path: Path) -> None:
    assert documents(write(tmp_path / "a[1].txt", "text")) == ["text"]


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "at home")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("~/a.txt") == documents("~/*.txt") == ["at home"]


def test_an_empty_file_among_others_is_no_document(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", "text")
    assert documents(tmp_path) == ["text"]


def test_a_python_file_is_read_in_the_encoding_it_declares(tmp_path: Path) -> None:
    source = "# -*- coding: latin-1 -*-\nname = 'Zoë'\n"
    assert documents(write(tmp_path / "a.py", source.encode("latin-1"))) == [source]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"text\0more", r"a\.txt is binary or UTF-16 \(NUL at byte 4\)"),
        ("text".encode("utf-16"), "binary or UTF-16"),
        (b"good\nb\xe4d", r"a\.txt is not UTF-8: byte 0xe4 at offset 6"),
        (b"cut \xe2\x96", "byte 0xe2 at offset 4"),
    ],
)
@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_unusable_text(tmp_path: Path, content: bytes, message: str, document: str) -> None:
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=message):
        documents(path, document=document)


def test_a_python_file_in_no_known_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither UTF-8 nor in the encoding it declares"):
        documents(write(tmp_path / "a.py", b"name = 'Zo\xeb'\n"))


@pytest.mark.parametrize("path", ["nowhere", "nowhere.txt", "*.txt", ""])
def test_a_path_that_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.path=.*: no (such )?file"):
        documents(path)


def test_a_folder_without_txt_files_tells_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no files"):
        documents(tmp_path)
    write(tmp_path / "a.md", "text")
    with pytest.raises(DataError, match=r"\.md \(1\).*\*\.md"):
        documents(tmp_path)


def test_a_file_that_is_no_regular_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        documents(tmp_path / "pipe")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "text")

    def denied(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    for document in ("file", "line", "paragraph"):
        with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
            documents(path, document=document)
    with pytest.raises(DataError, match="Permission denied"):
        open_corpus(text_config(path)).fingerprint(tmp_path)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    corpus = open_corpus(text_config(path))
    path.unlink()
    with pytest.raises(DataError, match="cannot read"):
        list(corpus.records())
    with pytest.raises(DataError, match="cannot read"):
        corpus.fingerprint(tmp_path)


def test_an_unknown_kind_of_data_is_our_own_mistake() -> None:
    with pytest.raises(TypeError, match="DataConfig"):
        open_corpus(DataConfig(seq_len=8))


# ---------------------------------------------------------------------------------- fingerprint


def corpus_of(*paths: Path) -> Corpus:
    return Corpus(name="test", readers={"train": [TextReader(LocalFile(path)) for path in paths]})


def test_fingerprint_follows_content_and_file_borders_not_place(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", "one"), write(tmp_path / "b", "two")
    same = corpus_of(write(tmp_path / "c" / "x", "one"), write(tmp_path / "c" / "y", "two"))
    other_border = corpus_of(write(tmp_path / "d", "onet"), write(tmp_path / "e", "wo"))
    assert corpus_of(a, b).fingerprint(tmp_path) == same.fingerprint(tmp_path)
    assert corpus_of(a, b).fingerprint(tmp_path) != corpus_of(a).fingerprint(tmp_path)
    assert corpus_of(a, b).fingerprint(tmp_path) != other_border.fingerprint(tmp_path)


def test_fingerprint_reads_unchanged_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", "one")
    os.utime(path, (1_000, 1_000))
    first = corpus_of(path).fingerprint(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("lmtrain.data.sources.files.file_digest", lambda path: pytest.fail("read again"))
        assert corpus_of(path).fingerprint(tmp_path / "cache") == first
    write(path, "two")
    os.utime(path, (2_000, 2_000))
    assert corpus_of(path).fingerprint(tmp_path / "cache") != first


def test_fingerprint_of_a_file_that_just_changed_is_not_remembered(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "one")
    status = path.stat()
    first = corpus_of(path).fingerprint(tmp_path / "cache")
    write(path, "two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a coarse file-system clock would leave it
    assert corpus_of(path).fingerprint(tmp_path / "cache") != first


def test_fingerprint_does_not_believe_a_cut_off_note(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "one")
    os.utime(path, (1_000, 1_000))
    first = corpus_of(path).fingerprint(tmp_path / "cache")
    (note,) = (tmp_path / "cache" / "fingerprints").iterdir()
    note.write_text("")
    assert corpus_of(path).fingerprint(tmp_path / "cache") == first


def test_fingerprint_does_without_a_writable_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "one")
    os.utime(path, (1_000, 1_000))
    assert corpus_of(path).fingerprint(path / "below a file") == corpus_of(path).fingerprint(tmp_path)


def test_a_path_that_cannot_be_looked_at(tmp_path: Path) -> None:
    for path in ("x" * 5000, f"{tmp_path}/{'y' * 300}.txt"):
        with pytest.raises(DataError, match=r"cannot read .*: File name too long"):
            open_corpus(text_config(path))


def test_fingerprints_of_plain_text_are_those_of_earlier_versions(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one\n"), ("b.txt", "two\n")):
        write(tmp_path / name, text)
    sums = [hashlib.sha256(text).digest() for text in (b"one\n", b"two\n")]
    expected = hashlib.sha256(b"".join(sums)).hexdigest()
    assert open_corpus(text_config(tmp_path)).fingerprint(tmp_path / "cache") == expected
