"""Records of JSON, CSV, TSV and Parquet: which field is read, and what is said of a record that cannot be."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.config.schema import ChatConfig, PairsConfig, RecordsConfig
from lmtrain.data.records import Conversation, Message, Pair
from lmtrain.data.sources import blocks, open_corpus
from lmtrain.errors import DataError


def records(path: Path, **settings: object) -> list[object]:
    return list(open_corpus(RecordsConfig(seq_len=8, path=str(path), **settings)).records())  # type: ignore[arg-type]


def chat(path: Path, **settings: object) -> list[object]:
    return list(open_corpus(ChatConfig(seq_len=8, path=str(path), **settings)).records())  # type: ignore[arg-type]


def skipping(path: Path, config: type = RecordsConfig, **settings: object) -> tuple[list[object], list[str]]:
    """The records, and the reasons of those that were left out."""
    corpus = open_corpus(config(seq_len=8, path=str(path), on_bad_record="skip", **settings))
    reasons: list[str] = []
    return list(corpus.records(on_skip=reasons.append)), reasons


def write(path: Path, *rows: object) -> Path:
    """JSON lines of objects, or of texts as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------------------- the field


def test_the_text_is_in_the_first_of_the_usual_fields(tmp_path: Path) -> None:
    both = write(tmp_path / "a.jsonl", {"output": "no", "content": "yes"}, {"content": "again"})
    assert records(both) == ["yes", "again"]
    assert records(both.rename(tmp_path / "b.jsonl"), field="content") == ["yes", "again"]
    assert records(write(tmp_path / "c.jsonl", {"text": ""}, {"text": " a "}), field="text") == [" a "]


def test_a_field_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"title": "x", "id": 3})
    with pytest.raises(DataError, match=r"a\.jsonl:1 has none of the fields text, .*title, id.*data\.field=NAME"):
        records(path)
    with pytest.raises(DataError, match=r"a\.jsonl:1 has no field 'story'; its fields are title, id"):
        records(path, field="story")
    table = tmp_path / "a.csv"
    table.write_text("title,id\nx,3\n")
    with pytest.raises(DataError, match=r"a\.csv has no field 'story'; its fields are title, id"):
        records(table, field="story", on_bad_record="skip")  # of every row, so nothing to skip
    pyarrow.parquet.write_table(pyarrow.table({"title": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has none of the fields .*title"):
        records(tmp_path / "a.parquet")


@pytest.mark.parametrize(("value", "what"), [(None, "null"), (3, "int"), (["a"], "list"), ({"a": "b"}, "dict")])
def test_what_is_no_text_is_a_bad_record(tmp_path: Path, value: object, what: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "good"}, {"text": value}, {"text": "too"})
    with pytest.raises(
        DataError, match=rf"a\.jsonl:2 has no text in its field 'text', but {what}; data\.on_bad_record"
    ):
        records(path)
    assert skipping(path) == (["good", "too"], ["not a text"])


def test_an_empty_text_is_no_document_and_not_bad(tmp_path: Path) -> None:
    assert records(write(tmp_path / "a.jsonl", {"text": ""}, {"text": "a"})) == ["a"]
    (tmp_path / "a.csv").write_text('id,text\n1,\n2,""\n3,b\n')
    assert records(tmp_path / "a.csv") == ["b"]


# --------------------------------------------------------------------------------------------------- JSON


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), ascii_only=st.booleans())
def test_json_lines_are_what_python_reads(
    texts: list[str], ascii_only: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": text}, ensure_ascii=ascii_only).encode() + b"\r\n" for text in texts))
    if texts:
        assert records(path) == texts


def test_json_lines_may_have_blanks_around_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf {"text": "a"} \r\n\n  \t\n\t{"text": "b"}\t\n{"text": "c"}')
    assert records(path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"text": "cut', "not valid JSON", r"is not valid JSON: Unterminated string starting at \(column 10\)"),
        ("{'text': 'x'}", "not valid JSON", "is not valid JSON: Expecting property name"),
        ('{"text": "a"} {"text": "b"}', "not valid JSON", r"is not valid JSON: Extra data \(column 15\)"),
        ("[" * 100_000, "not valid JSON", "is not valid JSON: maximum recursion depth exceeded"),
        ('{"id": ' + "9" * 5000 + "}", "not valid JSON", "is not valid JSON: Exceeds the limit"),
        ('["text"]', "no JSON object", "is no object with fields, but list"),
        ("null", "no JSON object", "is no object with fields, but null"),
        (r'{"text": "\ud83d"}', "not UTF-8", "has bytes that are not UTF-8, or half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: str, reason: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "good"}, "", line, {"text": "too"})
    with pytest.raises(DataError, match=rf"a\.jsonl:3 {message}"):
        records(path)
    with pytest.raises(DataError, match=rf"a\.jsonl:3 {message}"):
        records(write(tmp_path / "b_a.jsonl", {"text": "good"}, "", line))
    assert skipping(path) == (["good", "too"], [reason])


def test_a_line_that_is_not_utf8_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "Z\xfcrich"}\n{"text": "N\0"}\n{"text": "too"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl is binary or UTF-16 \(NUL at byte 47\) in line 3"):
        records(path)
    assert skipping(path) == (["good", "too"], ["not UTF-8", "not valid JSON"])
    path.write_bytes(path.read_bytes().replace(b"\0", b""))
    with pytest.raises(DataError, match=r"a\.jsonl is not UTF-8: byte 0xfc at offset 28, line 2"):
        records(path)


def test_a_json_file_is_a_list_or_an_object_or_lines(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    path = tmp_path / "a.json"
    for content in (
        json.dumps(rows),
        json.dumps(rows, indent=2),
        "\n\n" + json.dumps(rows),
        "\n".join(map(json.dumps, rows)),
    ):
        path.write_text(content)
        assert records(path) == ["a", "b"]
    path.write_text(json.dumps(rows[0], indent=2))
    assert records(path) == ["a"]
    path.write_text(json.dumps([*rows, 3]))
    with pytest.raises(DataError, match=r"a\.json, record 3 is no object with fields, but int"):
        records(path)
    assert skipping(path) == (["a", "b"], ["no JSON object"])
    path.write_text(json.dumps(rows, indent=2)[:-10])
    with pytest.raises(DataError, match=r"a\.json:\d is not valid JSON: "):
        records(path, on_bad_record="skip")  # nothing of a broken list can be left out
    path.write_text('{"text": "a", \n{"text": "b"}\n')
    assert skipping(path) == (["b"], ["not valid JSON"])


def test_a_line_larger_than_a_block_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    rows = [{"text": "é" * length} for length in (1, 500, 3, 20, 64, 700)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert records(path) == [row["text"] for row in rows]
    monkeypatch.setattr(blocks, "LONGEST_LINE", 600)
    with pytest.raises(DataError, match=r"a\.jsonl:6 goes on for more than"):
        records(path)


# ------------------------------------------------------------------------------------------- CSV and TSV


@given(
    rows=st.lists(
        st.tuples(st.text(st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])), st.integers())
    ),
    delimiter=st.sampled_from(",\t"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_tables_are_what_python_writes(
    rows: list[tuple[str, int]], delimiter: str, end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows([("text", "id"), *rows])
    path = tmp_path_factory.mktemp("table") / ("a.csv" if delimiter == "," else "a.tsv")
    path.write_bytes(out.getvalue().encode())
    assert records(path) == [text for text, _ in rows if text]


def test_rows_that_do_not_fit_are_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"two\nlines"\n2\n\n3,a,b\n4,"a" b\n5,end\n')
    with pytest.raises(DataError, match=r"a\.csv:4 has 1 cells, and the first line names 2 columns"):
        records(path)
    found, reasons = skipping(path)
    assert found == ["two\nlines", "end"]
    assert reasons == ["wrong number of cells", "wrong number of cells", "not valid CSV"]


def test_a_quote_that_is_never_closed_is_no_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,a\n2,"b\n3,c\n4,d\n')
    with pytest.raises(DataError, match=r"a\.csv:3 opens a quote that is never closed"):
        skipping(path)


def test_a_table_names_each_column_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match=r"a\.csv has several columns 'text'"):
        records(path)
    path.write_text("text,x,x\na,b,c\n")
    assert records(path) == ["a"]


def test_a_large_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'text\n"{"x" * 300_000}"\n')
    assert records(path) == ["x" * 300_000]


# ----------------------------------------------------------------------------------------------- Parquet


def test_parquet_reads_the_columns_it_needs(tmp_path: Path) -> None:
    table = pyarrow.table({"id": [1, 2, 3], "text": ["a", None, "c"], "large": ["x" * 10] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert records(tmp_path / "a.parquet", field="large") == ["x" * 10] * 3
    with pytest.raises(DataError, match=r"a\.parquet, row 2 has no text in its field 'text', but null"):
        records(tmp_path / "a.parquet")
    assert skipping(tmp_path / "a.parquet") == (["a", "c"], ["not a text"])


def test_a_file_of_no_known_format(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.pdf is of no known format: .*\.jsonl.*data=text"):
        records(tmp_path / "a.pdf")
    (tmp_path / "a.parquet").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"a\.parquet is damaged or of another format"):
        records(tmp_path / "a.parquet")


# ------------------------------------------------------------------------------------------- conversations


def test_conversations_with_the_names_that_are_usual(tmp_path: Path) -> None:
    expected = Conversation((Message("system", "s"), Message("user", "q"), Message("assistant", "")))
    turns = [("system", "s"), ("user", "q"), ("assistant", "")]
    one = write(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": content} for role, content in turns]})
    assert chat(one) == [expected]
    names = {"user": "human", "assistant": "gpt"}
    other = {"conversations": [{"from": names.get(role, role), "value": content} for role, content in turns]}
    assert chat(write(tmp_path / "b.jsonl", other)) == [expected]
    assert chat(write(tmp_path / "c.jsonl", {"dialog": other["conversations"]}), field="dialog") == [expected]
    table = pyarrow.Table.from_pylist([{"messages": other["conversations"]}])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert chat(tmp_path / "d.parquet") == [expected]


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            "unknown role",
            "unknown role 'narrator'; known are system",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn", "has no assistant turn"),
        ({"messages": []}, "no assistant turn", "has no assistant turn"),
        ({"messages": "hi"}, "not a list of messages", "has no list of messages in its field 'messages'"),
        ({"messages": ["hi"]}, "not a list of messages", "a message that is no object"),
        ({"messages": [{"role": "assistant", "content": None}]}, "not a text", "field 'content', but null"),
        ({"messages": [{"role": "assistant", "content": [{"text": "x"}]}]}, "not a text", "field 'content', but list"),
        ({"messages": [{"content": "x"}]}, "unknown role", "unknown role 'None'"),
        ({"other": []}, "missing field", "has no field 'messages'; its fields are other"),
    ],
)
def test_a_conversation_that_cannot_be_learned(tmp_path: Path, record: object, reason: str, message: str) -> None:
    good = {"messages": [{"role": "assistant", "content": "x"}]}
    path = write(tmp_path / "a.jsonl", good, record, good)
    with pytest.raises(DataError, match=rf"a\.jsonl:2 .*{message}"):
        chat(path)
    found, reasons = skipping(path, ChatConfig)
    assert (len(found), reasons) == (2, [reason])


# --------------------------------------------------------------------------------------------------- pairs


def pairs(path: Path, source: str, target: str, **settings: object) -> list[object]:
    config = PairsConfig(seq_len=8, path=str(path), source=source, target=target, **settings)  # type: ignore[arg-type]
    return list(open_corpus(config).records())


def test_pairs_of_fields_and_templates(tmp_path: Path) -> None:
    row = {"question": "why?", "answers": {"text": ["because", "so"]}, "n": 3}
    path = write(tmp_path / "a.jsonl", row)
    assert pairs(path, "question", "{answers[text][0]}") == [Pair("why?", "because")]
    assert pairs(path, "{n:02d}: {question} {{}}", "question") == [Pair("03: why? {}", "why?")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert pairs(tmp_path / "a.parquet", "{n}", "{answers[text][1]}") == [Pair("3", "so")]
    (tmp_path / "a.tsv").write_text("de\ten\nja\tyes\n")
    assert pairs(tmp_path / "a.tsv", "de", "en") == [Pair("ja", "yes")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x", "a": {"text": []}}, r"does not fit the template '\{a\[text\]\[0\]\}': list index out of range"),
        ({"q": "x", "a": None}, "does not fit the template"),
        ({"q": "x", "a": {"text": [None]}}, "has no text where a template needs one, but null"),
        ({"q": "x", "a": {"text": [["x"]]}}, "has no text where a template needs one, but list"),
        ({"q": "x", "a": {"text": [""]}}, "has an empty target"),
        ({"q": " ", "a": {"text": ["x"]}}, "has an empty source"),
        ({"q": 3, "a": {"text": ["x"]}}, "has no text in its field 'q', but int"),
        ({"q": "x"}, "has no field 'a'; its fields are q"),
    ],
)
def test_a_pair_that_lacks_a_side(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"q": "x", "a": {"text": ["y"]}}, row)
    with pytest.raises(DataError, match=rf"a\.jsonl:2 {message}"):
        pairs(path, "q", "{a[text][0]}")
    found, reasons = skipping(path, PairsConfig, source="q", target="{a[text][0]}")
    assert (found, len(reasons)) == ([Pair("x", "y")], 1)


@pytest.mark.parametrize("template", ["{a", "{}", "{{a}}", "a}{"])
def test_what_is_no_template(tmp_path: Path, template: str) -> None:
    with pytest.raises(DataError, match=r"data\.target=.* is no template: "):
        pairs(write(tmp_path / "a.jsonl", {"q": "x"}), "q", template)


def test_a_table_without_a_header_shows_what_it_takes_for_one(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("Ja.\tYes.\nNein.\tNo.\n")
    with pytest.raises(DataError, match=r"a\.tsv has no field 'de'; its fields are Ja\., Yes\."):
        pairs(tmp_path / "a.tsv", "de", "en")


# ------------------------------------------------------------------------------------------ aligned files


def aligned(folder: Path, name: str, source: str, target: str) -> None:
    (folder / f"{name}.de").write_text(source)
    (folder / f"{name}.en.gz").write_bytes(gzip.compress(target.encode()))


def test_files_that_belong_together_are_found(tmp_path: Path) -> None:
    for name in ("train", "val", "test_2016"):
        aligned(tmp_path, name, f"{name} ä\r\nb", f"{name} x\ny\n")
    corpus = open_corpus(PairsConfig(seq_len=8, path=str(tmp_path), source="de", target="en"))
    assert corpus.splits == ("train", "val", "test")
    for split, name in zip(corpus.splits, ("train", "val", "test_2016"), strict=True):
        assert list(corpus.records(split)) == [Pair(f"{name} ä", f"{name} x"), Pair("b", "y")]
    expected = [Pair("train ä", "train x"), Pair("b", "y")]
    assert pairs(tmp_path / "train.de", "de", "en") == pairs(tmp_path / "train.en.gz", "de", "en") == expected
    named = {"target_path": str(tmp_path / "val.en.gz"), "val_path": str(tmp_path / "val.de")}
    assert pairs(tmp_path / "train.de", "source", "target", **{"target_path": named["target_path"]}) == [
        Pair("train ä", "val x"),
        Pair("b", "y"),
    ]


def test_files_that_have_no_answer(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_text("x\n")
    with pytest.raises(DataError, match=r"a\.de has no file beside it that ends in \.en; name it by data\.target_path"):
        pairs(tmp_path / "a.de", "de", "en")
    with pytest.raises(DataError, match=r"a\.de holds no pairs: .*data\.target_path=PATH"):
        pairs(tmp_path / "a.de", "fr", "en")
    with pytest.raises(DataError, match=r"data\.target_path=nowhere: no such file"):
        pairs(tmp_path / "a.de", "de", "en", target_path="nowhere")
    with pytest.raises(DataError, match=r"data\.val_target_path answers a data\.val_path, which is not set"):
        pairs(tmp_path / "a.de", "de", "en", val_target_path="x")


def test_files_with_different_numbers_of_lines_never_match(tmp_path: Path) -> None:
    for source, target, counts in (("a\nb\nc\n", "x\n", "3 and 1"), ("a\n", "x\ny", "1 and 2")):
        aligned(tmp_path, "train", source, target)
        with pytest.raises(DataError, match=f"do not belong together: there are {counts} of them"):
            pairs(tmp_path, "de", "en", on_bad_record="skip")


def test_a_line_without_an_answer_is_bad_and_blank_pairs_are_none(tmp_path: Path) -> None:
    aligned(tmp_path, "train", "a\n\nb\n\n", "x\n\n\n\n")
    with pytest.raises(DataError, match=r"train\.de:3 has an empty target"):
        pairs(tmp_path, "de", "en")
    found, reasons = skipping(tmp_path, PairsConfig, source="de", target="en")
    assert (found, reasons) == ([Pair("a", "x")], ["empty target"])


# --------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1_000_000)
    rows, text = 30_000, "a line of some length over and over; " * 20
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [text] * rows}), path, use_dictionary=False, row_group_size=2000
        )
    else:
        head, line = ("text\n", f"{text}\n") if name == "a.csv" else ("", json.dumps({"text": text}) + "\n")
        path.write_text(head + line * rows)
    corpus = open_corpus(RecordsConfig(seq_len=8, path=str(path)))
    tracemalloc.start()
    try:
        assert sum(1 for _ in corpus.records()) == rows
        assert tracemalloc.get_traced_memory()[1] < 10 * blocks.BLOCK_BYTES < rows * len(text) / 2
    finally:
        tracemalloc.stop()
