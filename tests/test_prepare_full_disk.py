"""No space left, at any moment of a build: told in a line, and nothing stays behind to take more of it."""

from __future__ import annotations

import re
import sys
import textwrap
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from full_disk import FullDisk, on_a_small_disk

from lmtrain.config.schema import (
    DataConfig,
    MixtureConfig,
    PairsConfig,
    SentencePieceBpeConfig,
    TextConfig,
)
from lmtrain.data import build
from lmtrain.data.prepare import prepare
from lmtrain.errors import DataError

TOKENIZER = SentencePieceBpeConfig(vocab_size=300)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Two sources, one of them with targets, in several batches, with a mark after each."""
    monkeypatch.setattr(build, "BATCH_CHARS", 500)
    monkeypatch.setattr(build, "BATCHES_PER_MARK", 1)
    (tmp_path / "lines.txt").write_text("".join(f"line {number} of the text\n" for number in range(80)))
    (tmp_path / "pairs.tsv").write_text("q\ta\n" + "".join(f"what is {n}\tit is {n}\n" for n in range(40)))
    lines = TextConfig(seq_len=8, path=str(tmp_path / "lines.txt"), document="line", test_fraction=0.1)
    pairs = PairsConfig(seq_len=8, path=str(tmp_path / "pairs.tsv"), source="q", target="a")
    return MixtureConfig(seq_len=8, cache_dir=str(tmp_path / "cache"), sources={"lines": lines, "pairs": pairs})


def left_in(cache: Path) -> set[str]:
    """What is in the cache beside locks."""
    return {path.name for path in (cache / "prepared").glob("*") if path.suffix != ".lock"}


def files_of(data: DataConfig) -> dict[str, bytes]:
    """What is prepared, by the names of its files."""
    return {path.name: path.read_bytes() for path in prepare(data, TOKENIZER).sources[0].folder.iterdir()}


def test_a_disk_that_fills_at_any_write(
    tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = files_of(replace(data, cache_dir=str(tmp_path / "whole")))
    cache = tmp_path / "cache"
    (cache / "prepared").mkdir(parents=True)
    for full_at in count():
        with monkeypatch.context() as patch:
            disk = FullDisk(cache, full_at, patch)
            try:
                prepare(data, TOKENIZER)
                break
            except DataError as error:
                told = str(error)
        assert re.fullmatch(r"cannot write prepared data to .*: No space left on device; .*cache_dir=.*", told)
        assert not caplog.records
        if left := left_in(cache):  # only the name of the whole entry was not yet sure to be on disk
            assert disk.failed == "fsync"
            assert [len(name) for name in left] == [32]
    assert full_at > 100
    assert files_of(data) == expected
    assert left_in(cache) == {prepare(data, TOKENIZER).sources[0].folder.name}
    assert not prepare(data, TOKENIZER).sources[0].built


# ------------------------------------------------------------------------------------------ a real one


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("kilobytes", [4, 60, 700, 2000])
def test_a_small_disk(tmp_path: Path, kilobytes: int, cores: int) -> None:
    """The tokens take 3 MB. With two cores, the disk fills while other processes encode."""
    (tmp_path / "lines.txt").write_text("".join(f"line {number} of the text\n" for number in range(60_000)))
    script = textwrap.dedent(f"""
        from lmtrain.data import build, prepare
        from lmtrain.config.schema import ByteConfig, TextConfig
        prepare.ALONE_CHARS, build.available_cores, build.BATCH_CHARS = 0, lambda: {cores}, 100_000
        data = TextConfig(seq_len=8, path="lines.txt", document="line", cache_dir="disk/cache")
        try:
            prepare.prepare(data, ByteConfig())
        except prepare.DataError as error:
            print("told:", error)
    """)
    (tmp_path / "build.py").write_text(script)
    show = "find disk/cache/prepared -mindepth 1 -not -name '*.lock'"
    done = on_a_small_disk(tmp_path, kilobytes, f'{sys.executable} build.py; echo "status $?"; {show}; echo "left"')
    assert "told: cannot write prepared data to disk/cache: No space left on device" in done.stdout
    assert done.stdout.endswith("status 0\nleft\n")
    assert not done.stderr
