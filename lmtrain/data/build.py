"""Tokens written to disk: by all cores, in the order of the text, from where a killed build stopped.

Owns the files of one source in an entry of the cache. What goes where was decided in `survey`, what a document becomes
in `encoding`.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.documents import Documents
from lmtrain.data.encoding import Encoded, Encoder
from lmtrain.data.prepared import PreparedSplit, SplitName
from lmtrain.data.survey import Stretch, size_of
from lmtrain.data.tokenizer import load_tokenizer, token_dtype
from lmtrain.errors import DataError
from lmtrain.machine import available_cores
from lmtrain.run_dir import write_atomically

TOKENIZER_FILE = "tokenizer.model"

BATCH_CHARS = 1_000_000
"""Text tokenised at once by one process."""

_MARK = ".mark"

BATCHES_PER_MARK = 64
"""So much is done again, at most, after a kill."""

Encode = Callable[[list[Stretch]], tuple[int, dict[SplitName, Encoded]]]

ALONE_CHARS = 24_000_000
"""Less text than this is tokenised sooner `alone` than other processes have started."""


class SplitFiles:
    """The arrays of a split of a source: `train.tokens`, `train.ends` and, if some tokens are no targets, two more."""

    def __init__(self, folder: Path, source: str, split: SplitName, *, prompts: bool) -> None:
        """`source` is empty if there is one only."""
        stem = folder / (f"{source}.{split}" if source else split)
        names = ("tokens", "ends", "counted", "prompts") if prompts else ("tokens", "ends")
        self.paths = {name: stem.with_name(f"{stem.name}.{name}") for name in names}

    def load(self, vocab_size: int, num_bytes: int) -> PreparedSplit:
        """Map the arrays into memory. Raises OSError or ValueError if one is missing or empty."""
        dtypes = {"tokens": token_dtype(vocab_size), "ends": np.int64, "counted": np.bool_, "prompts": np.int64}
        arrays: dict[str, Any] = {name: np.memmap(path, dtypes[name], "r") for name, path in self.paths.items()}
        return PreparedSplit(documents=Documents(**arrays), num_bytes=num_bytes)


def write_tokens(
    folder: Path,
    source: str,
    splits: Sequence[SplitName],
    stretches: Iterable[Stretch],
    *,
    prompts: bool,
    alone: bool,
    report: Callable[[int], None],
) -> dict[SplitName, int]:
    """Write the files of one source; returns the bytes of text in each split.

    A build that was killed here goes on: `stretches` must be the same then. `report` gets the characters that are
    done.
    """
    mark = _Mark(folder / f".{source}{_MARK}")
    with ExitStack() as open_files:
        writers = {
            split: _Writer(SplitFiles(folder, source, split, prompts=prompts), mark.sizes.get(split), open_files)
            for split in splits
        }
        batches = islice(_batches(stretches), mark.batches, None)
        for chars, encoded in _encoded(batches, folder, prompts=prompts, alone=alone):
            for split, tokens in encoded.items():
                writers[split].write(tokens)
            mark.batches += 1
            mark.chars += chars
            report(mark.chars)
            if mark.batches % BATCHES_PER_MARK == 0:
                mark.write({split: writer.sync() for split, writer in writers.items()})
        mark.write({split: writer.sync() for split, writer in writers.items()})
        return {split: writer.num_bytes for split, writer in writers.items()}


def remove_marks(folder: Path) -> None:
    """Forget how far the files of a draft had come: they are complete."""
    for path in folder.glob(f".*{_MARK}"):
        path.unlink()


def _batches(stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
    batch: list[Stretch] = []
    num_chars = 0
    for stretch in stretches:
        batch.append(stretch)
        num_chars += size_of(stretch.record)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------- encoding


def _encoded(
    batches: Iterable[list[Stretch]], folder: Path, *, prompts: bool, alone: bool
) -> Generator[tuple[int, dict[SplitName, Encoded]]]:
    """Every batch in order: its characters, and its tokens by split."""
    encode = functools.partial(_encode, str(folder / TOKENIZER_FILE), prompts)
    cores = available_cores()
    if alone or cores == 1:
        try:
            yield from map(encode, batches)
        finally:
            _encoder.cache_clear()  # it remembers words, which the training has no use for
        return
    from loky import get_reusable_executor

    executor = get_reusable_executor(max_workers=cores, initializer=_end_with, initargs=(os.getpid(),))
    encoding: deque[Future[tuple[int, dict[SplitName, Encoded]]]] = deque()
    try:
        for batch in batches:
            if len(encoding) == 2 * cores:  # so many batches are in memory at a time
                yield encoding.popleft().result()
            encoding.append(executor.submit(_encode_columns, encode, list(zip(*batch, strict=True))))
        while encoding:
            yield encoding.popleft().result()
    except BrokenExecutor as error:
        raise DataError(
            "a process that tokenises was killed, most likely for want of memory; free some and start again"
        ) from error
    finally:
        executor.shutdown(wait=True, kill_workers=True)  # or they would wait for more, beside the training


def _end_with(parent: int) -> None:
    """End this process soon after `parent`, even if that is killed: it would wait for more, and nobody ask for it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode_columns(encode: Encode, columns: list[tuple[Any, ...]]) -> tuple[int, dict[SplitName, Encoded]]:
    """Columns go to another process in half the time of rows."""
    return encode([Stretch(*row) for row in zip(*columns, strict=True)])


def _encode(tokenizer: str, prompts: bool, batch: list[Stretch]) -> tuple[int, dict[SplitName, Encoded]]:
    return sum(size_of(stretch.record) for stretch in batch), _encoder(tokenizer, prompts)(batch)


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer: str, prompts: bool) -> Encoder:
    return Encoder(load_tokenizer(Path(tokenizer)), prompts=prompts)


# ------------------------------------------------------------------------------------------- writing


class _Mark:
    """How far a build has come, if it was killed: batches that are on disk, and what the files held then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches, self.chars = 0, 0
        self.sizes: dict[str, dict[str, int]] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["batch_chars"] == BATCH_CHARS:  # else a batch is another one now
                self.batches, self.chars, self.sizes = content["batches"], content["chars"], content["sizes"]

    def write(self, sizes: dict[SplitName, dict[str, int]]) -> None:
        content = {"batch_chars": BATCH_CHARS, "batches": self.batches, "chars": self.chars, "sizes": sizes}
        write_atomically(self.path, json.dumps(content))


class _Writer:
    """Appends to the files of one split."""

    def __init__(self, files: SplitFiles, sizes: dict[str, int] | None, open_files: ExitStack) -> None:
        """With `sizes`, the files are cut back to them and gone on with."""
        self._files: dict[str, BinaryIO] = {}
        for name, path in files.paths.items():
            file = open_files.enter_context(path.open("r+b" if sizes else "wb"))
            if sizes is not None:
                file.truncate(sizes[name])
                file.seek(0, os.SEEK_END)
            self._files[name] = file
        self.num_bytes = 0 if sizes is None else sizes["num_bytes"]
        self._num_tokens = 0 if sizes is None else sizes["num_tokens"]

    def write(self, encoded: Encoded) -> None:
        arrays: dict[str, NDArray[np.generic] | None] = {
            "tokens": encoded.tokens,
            "ends": encoded.ends + self._num_tokens,
            "counted": encoded.counted,
            "prompts": encoded.prompts,
        }
        for name, file in self._files.items():
            array = arrays[name]
            assert array is not None
            file.write(array.data)
        self._num_tokens += len(encoded.tokens)
        self.num_bytes += encoded.num_bytes

    def sync(self) -> dict[str, int]:
        """See that everything is on disk; returns what there is."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        return sizes | {"num_bytes": self.num_bytes, "num_tokens": self._num_tokens}
