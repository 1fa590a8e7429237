"""Arrays of token ids made elsewhere: .npy, .npz and raw .bin, mapped into memory as far as the format allows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.records import TokenIds
from lmtrain.data.sources.bad_records import BadRecords
from lmtrain.data.sources.blocks import readable
from lmtrain.data.sources.files import SourceFile, in_short
from lmtrain.errors import DataError

SUFFIXES = (".npy", ".npz", ".bin")

_CHUNK = 16_000_000  # ids looked at at once


@dataclass(frozen=True)
class ArrayReader:
    """A file of one array: of one dimension, the whole or up to each `end_id` a document; of two, a row each."""

    file: SourceFile
    dtype: str  # of a .bin
    end_id: int | None

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """What is read."""
        return (self.file,)

    @property
    def format(self) -> str:
        """How the bytes become records."""
        return f"tokens {Path(self.file.name).suffix}"

    def records(self, bad: BadRecords) -> Iterator[TokenIds]:
        """The documents in order, without their `end_id`. Nothing of an array is a bad record: it is used or not."""
        path = self.file.local()
        ids = _load(path, self.dtype)
        if ids.dtype.kind not in "iu":
            raise DataError(f"{path} holds numbers of the type {ids.dtype}: token ids are integers")
        if ids.ndim not in (1, 2):
            raise DataError(f"{path} has {ids.ndim} dimensions: one is needed, or two with a document a row")
        for row in ids if ids.ndim == 2 else [ids]:
            yield from self._documents(path, row)

    def _documents(self, path: Path, ids: NDArray[np.integer[Any]]) -> Iterator[TokenIds]:
        start = 0
        for begin in range(0, len(ids), _CHUNK):
            chunk = ids[begin : begin + _CHUNK]
            if int(chunk.min()) < 0:
                position = begin + int(np.argmax(chunk < 0))
                raise DataError(f"{path} holds the negative id {ids[position]} at position {position:,}")
            ends = begin + np.flatnonzero(chunk == self.end_id) if self.end_id is not None else ()
            for end in map(int, ends):
                if end > start:
                    yield ids[start:end]
                start = end + 1
        if start < len(ids):
            yield ids[start:]


def _load(path: Path, dtype: str) -> NDArray[Any]:
    with readable(path):
        if path.suffix == ".bin":
            return _load_raw(path, np.dtype(dtype))
        try:
            with warnings.catch_warnings(action="ignore"):
                loaded = np.load(path, mmap_mode="r", allow_pickle=False)
                return loaded if isinstance(loaded, np.ndarray) else _only(path, loaded)
        except (DataError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # whatever zip files and headers of arrays can be damaged in
            raise DataError(f"{path} is damaged or no array of NumPy's: {in_short(error)}") from error


def _load_raw(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise DataError(f"{path} has {size:,} bytes, which are no whole number of {dtype} (data.dtype)")
    return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)


def _only(path: Path, archive: Any) -> NDArray[Any]:
    """The one array of an .npz, which is in memory as a whole."""
    with archive:
        if len(archive.files) != 1:
            raise DataError(f"{path} holds {len(archive.files)} arrays ({', '.join(archive.files)}): it must hold one")
        found = archive[archive.files[0]]
        if not isinstance(found, np.ndarray):
            raise DataError(f"{path} holds {archive.files[0]}, which is no array")
        return found
