"""Arrays of token ids: where documents end, and which arrays are no token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmtrain.config.schema import TokensConfig
from lmtrain.data.sources import arrays, open_corpus
from lmtrain.errors import DataError


def documents(path: Path, **settings: object) -> list[list[int]]:
    corpus = open_corpus(TokensConfig(seq_len=8, path=str(path), **settings))  # type: ignore[arg-type]
    return [record.tolist() for record in corpus.records() if isinstance(record, np.ndarray)]


def test_an_array_is_a_document_or_cut_at_its_end_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_CHUNK", 3)
    ids = np.array([9, 1, 2, 9, 9, 3, 4, 5, 6, 9, 7], np.int64)
    np.save(tmp_path / "a.npy", ids)
    np.savez_compressed(tmp_path / "a.npz", ids=ids)
    (tmp_path / "a.bin").write_bytes(ids.astype(np.uint32).tobytes())
    for name in ("a.npy", "a.npz", "a.bin"):
        assert documents(tmp_path / name, dtype="uint32") == [ids.tolist()]
        assert documents(tmp_path / name, dtype="uint32", end_id=9) == [[1, 2], [3, 4, 5, 6], [7]]
    np.save(tmp_path / "rows.npy", np.array([[1, 9, 2], [3, 4, 5]], np.uint8))
    assert documents(tmp_path / "rows.npy") == [[1, 9, 2], [3, 4, 5]]
    assert documents(tmp_path / "rows.npy", end_id=9) == [[1], [2], [3, 4, 5]]


def test_large_arrays_are_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1000, np.uint16))
    (tmp_path / "a.bin").write_bytes(bytes(2000))
    for name in ("a.npy", "a.bin"):
        (record,) = open_corpus(TokensConfig(seq_len=8, path=str(tmp_path / name))).records()
        assert isinstance(record, np.memmap)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([1.0, 2.0]), "holds numbers of the type float64: token ids are integers"),
        (np.array([True]), "holds numbers of the type bool"),
        (np.array([1], "m8[s]"), "holds numbers of the type timedelta64"),
        (np.zeros((2, 2, 2), int), "has 3 dimensions"),
        (np.array(3), "has 0 dimensions"),
        (np.array([5, 3, -1]), "holds the negative id -1 at position 2"),
        (np.array(["a"], object), "is damaged or no array of NumPy's: "),
    ],
)
def test_arrays_that_are_no_token_ids(tmp_path: Path, content: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(DataError, match=rf"a\.npy {message}"):
        documents(tmp_path / "a.npy", on_bad_record="skip")


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"a\.npy is damaged or no array of NumPy's"):
        documents(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", train=np.arange(3), val=np.arange(3))
    with pytest.raises(DataError, match=r"a\.npz holds 2 arrays \(train, val\): it must hold one"):
        documents(tmp_path / "a.npz")
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"a\.bin has 3 bytes, which are no whole number of uint16 \(data\.dtype\)"):
        documents(tmp_path / "a.bin")
    (tmp_path / "a.txt").write_bytes(b"123")
    with pytest.raises(DataError, match=r"a\.txt is no array of token ids: they are read from \.npy, \.npz, \.bin"):
        documents(tmp_path / "a.txt")
