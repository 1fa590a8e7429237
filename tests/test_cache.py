"""Freeing the cache: all entries and nothing else, none that is being built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

from lmtrain.data.cache import list_entries, remove_entry, remove_fingerprints

WHOLE, DAMAGED, CUT_OFF = ("a" * 32, "b" * 32, "c" * 32)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with three entries in a folder that holds other things too."""
    prepared = tmp_path / "prepared"
    for name in (WHOLE, DAMAGED, f"{CUT_OFF}.draft", "notes", "d" * 31, "e" * 33):
        (prepared / name).mkdir(parents=True)
        (prepared / name / "train.bin").write_bytes(bytes(1000))
    (prepared / WHOLE / "manifest.json").write_text(json.dumps({"corpus": "book.txt"}))
    (prepared / ("f" * 32)).write_text("a file")
    (prepared / ("0" * 32)).symlink_to(prepared / "notes")
    (tmp_path / "fingerprints").mkdir()
    for name in ("1" * 64, f"{'2' * 64}.77", "3" * 65, "README"):
        (tmp_path / "fingerprints" / name).write_text("x")
    (tmp_path / "thesis.txt").write_text("x")
    return tmp_path


def test_entries_are_those_of_the_cache_alone(cache: Path) -> None:
    entries = list_entries(cache)
    assert [entry.folder.name for entry in entries] == [WHOLE, DAMAGED, CUT_OFF]
    assert [entry.corpus for entry in entries] == ["book.txt", None, None]
    assert [entry.num_bytes for entry in entries] == [1022, 1000, 1000]
    assert list_entries(cache / "nowhere") == []


def test_all_entries_go_and_nothing_else(cache: Path) -> None:
    assert all(remove_entry(entry) for entry in list_entries(cache))
    remove_fingerprints(cache)
    remove_fingerprints(cache / "nowhere")
    assert list_entries(cache) == []
    left = {path.name for path in cache.rglob("*") if path.suffix != ".lock"}
    others = {"notes", "train.bin", "d" * 31, "e" * 33, "f" * 32, "0" * 32, "3" * 65, "README", "thesis.txt"}
    assert left == {"prepared", "fingerprints"} | others
    assert (cache / "prepared/notes/train.bin").stat().st_size == 1000


def test_an_entry_being_built_stays(cache: Path) -> None:
    with FileLock(cache / "prepared" / f"{CUT_OFF}.lock"):
        removed = [remove_entry(entry) for entry in list_entries(cache)]
    assert removed == [True, True, False]
    assert [entry.folder.name for entry in list_entries(cache)] == [CUT_OFF]


def test_a_reader_keeps_what_it_has_open(cache: Path) -> None:
    with (cache / "prepared" / WHOLE / "train.bin").open("rb") as file:
        assert remove_entry(list_entries(cache)[0])
        assert len(file.read()) == 1000
