"""Damage on disk is found, in the same time whatever the size."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmtrain.data import checksums


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 100)
    monkeypatch.setattr(checksums, "CHECKED_BLOCKS", 8)
    (tmp_path / "small").write_bytes(bytes(range(250)))
    (tmp_path / "large").write_bytes(bytes(range(250)) * 40)
    (tmp_path / "empty").touch()
    return sorted(tmp_path.iterdir())


def test_sound_files_pass(tmp_path: Path, files: list[Path]) -> None:
    sums = checksums.of_files(files)
    assert [len(noted["sums"]) for noted in sums.values()] == [0, 100, 3]
    for _ in range(20):
        checksums.verify(tmp_path, sums)


@pytest.mark.parametrize("byte", [0, 99, 100, 249])
def test_a_changed_byte_of_a_small_file_is_found(tmp_path: Path, files: list[Path], byte: int) -> None:
    sums = checksums.of_files(files)
    content = bytearray((tmp_path / "small").read_bytes())
    content[byte] ^= 1
    (tmp_path / "small").write_bytes(content)
    with pytest.raises(ValueError, match=f"small has changed at byte {byte // 100 * 100}"):
        checksums.verify(tmp_path, sums)


def test_a_large_file_is_sampled_with_its_ends(tmp_path: Path, files: list[Path]) -> None:
    sums = checksums.of_files(files)
    content = bytearray((tmp_path / "large").read_bytes())
    for place in (0, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "large").write_bytes(damaged)
        with pytest.raises(ValueError, match="large has changed"):
            checksums.verify(tmp_path, sums)
    damaged = bytearray(content)
    damaged[5000] ^= 1  # one block of a hundred, eight of which are checked at each call
    (tmp_path / "large").write_bytes(damaged)
    found = 0
    for _ in range(200):
        try:
            checksums.verify(tmp_path, sums)
        except ValueError:
            found += 1
    assert 1 <= found <= 60


def test_sizes_and_absence_are_noticed(tmp_path: Path, files: list[Path]) -> None:
    sums = checksums.of_files(files)
    (tmp_path / "large").write_bytes((tmp_path / "large").read_bytes()[:-1])
    with pytest.raises(ValueError, match="has not 10000 bytes"):
        checksums.verify(tmp_path, sums)
    (tmp_path / "large").unlink()
    with pytest.raises(OSError, match="large"):
        checksums.verify(tmp_path, sums)
