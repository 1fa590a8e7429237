"""Prepared data: a corpus split, tokenised and kept on disk as memory-mapped arrays, built once for everyone.

Owns what an entry of the cache holds and when it may be used. Does not read files (`sources`), choose what
validates (`split`), make entries appear or go (`cache`) or cut sequences (`batches`).

A cache entry `<cache>/prepared/<key>/` holds train.bin and val.bin (raw token ids), tokenizer.model and
manifest.json. It appears by a rename when it is complete, so a kill at any moment leaves no half entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lmtrain.config.schema import CharConfig, DataConfig, TokenizerConfig
from lmtrain.data.cache import building, cache_folder, draft_of, publish
from lmtrain.data.documents import Documents, ends_found
from lmtrain.data.prepared import PreparedData, PreparedSource, PreparedSplit, SplitName
from lmtrain.data.sources import Corpus, open_corpus
from lmtrain.data.split import Split, split_documents
from lmtrain.data.tokenizer import Tokenizer, load_tokenizer, sample_for, token_dtype, train_tokenizer
from lmtrain.errors import DataError

log = logging.getLogger(__name__)

PREPARE_VERSION = 1  # raise it when the same settings would give other tokens: older entries are then not used

_BATCH_CHARS = 4_000_000  # text tokenised at once
_NOT_IN_KEY = {"seq_len", "cache_dir", "path"}  # settings that do not change the tokens of the same content


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, on_progress: Callable[[str], None] | None = None
) -> PreparedData:
    """Find the prepared data of these settings in the cache, or build it.

    Any number of processes may call this at once: one builds, the others wait. The cache is `data.cache_dir`,
    else $LMTRAIN_CACHE, else the user's cache folder. `on_progress` gets short messages while something is
    built. Raises DataError for unusable text, a vocabulary the text does not allow, or an unwritable cache.
    """
    report = on_progress or (lambda message: None)
    corpus = open_corpus(data)
    cache = cache_folder(data)
    content = corpus.fingerprint(cache)
    folder = cache / "prepared" / _key(content, data, tokenizer)
    if found := _load(folder, corpus, built=False):
        return found
    try:
        with building(folder, report):
            if found := _load(folder, corpus, built=False):
                return found
            with draft_of(folder) as draft:
                _build(draft, corpus, data, tokenizer, report)
                if corpus.fingerprint(cache) != content:
                    raise DataError(f"{corpus.name} changed while it was being prepared; start again")
                publish(draft, folder)
            built = _load(folder, corpus, built=True)
    except OSError as error:
        raise DataError(
            f"cannot write prepared data to {cache}: {error.strerror or error}; "
            "name another folder by data.cache_dir=... or LMTRAIN_CACHE"
        ) from error
    assert built is not None, f"{folder} was damaged while it was built"
    return built


def _key(content: str, data: DataConfig, tokenizer: TokenizerConfig) -> str:
    identity = {
        "version": PREPARE_VERSION,
        "content": content,
        "data": {name: value for name, value in asdict(data).items() if name not in _NOT_IN_KEY},
        "tokenizer": [type(tokenizer).__name__, asdict(tokenizer)],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------- reading


def _load(folder: Path, corpus: Corpus, *, built: bool) -> PreparedData | None:
    """Open a cache entry; None if there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, size in manifest["sizes"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has not {size} bytes")
        tokenizer = load_tokenizer(folder / "tokenizer.model")
        counts = manifest["counts"]
        splits: dict[SplitName, PreparedSplit] = {}
        for name in ("train", "val"):
            tokens = np.memmap(folder / f"{name}.bin", token_dtype(tokenizer.vocab_size), "r")
            documents = Documents(tokens, ends_found(tokens, tokenizer.end_id))
            splits[name] = PreparedSplit(documents=documents, num_bytes=counts[f"{name}_bytes"])
        source = PreparedSource(
            name=corpus.name,
            weight=1.0,
            splits=splits,
            left_out={"shorter than data.min_chars": counts["dropped"]},
            duplicates=counts["duplicates"],
            content=corpus.fingerprint(folder.parent.parent),
            fingerprint=folder.name,
            folder=folder,
            built=built,
        )
        return PreparedData(sources=(source,), tokenizer=tokenizer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        log.warning("prepared data in %s is damaged (%s); building it again", folder, error)
        return None


# ------------------------------------------------------------------------------------------- building


def _build(
    folder: Path,
    corpus: Corpus,
    data: DataConfig,
    config: TokenizerConfig,
    report: Callable[[str], None],
) -> None:
    """Write a complete entry into the empty `folder`."""
    report(f"reading {corpus.name}")
    short: list[int] = []
    split = split_documents(corpus.documents(on_short=lambda text: short.append(1)), data.split, data.val_fraction)
    # A character without an id could not be encoded, so the char tokenizer sees the validation text as well.
    seen = corpus.documents() if isinstance(config, CharConfig) else _training_text(corpus, split)
    sample = sample_for(config)
    if sample is not None:
        for text in seen:
            sample.add(text, 0)
    report("training the tokenizer")
    lines = sample.lines(lambda key: True) if sample else []
    tokenizer = train_tokenizer(config, lines, sample.characters if sample else "", [])
    counts = _write_tokens(folder, corpus, split, tokenizer, report)
    tokenizer.save(folder / "tokenizer.model")
    manifest = {
        "sizes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "counts": counts | {"duplicates": split.duplicates, "dropped": len(short)},
        "corpus": corpus.name,
        "settings": [asdict(data), asdict(config)],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _training_text(corpus: Corpus, split: Split) -> Iterator[str]:
    return (text for text, _ in map(split.parts, corpus.documents()) if text)


class _TokenWriter:
    """Appends tokenised text to one file and counts what it was."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer) -> None:
        self._file = file
        self._tokenizer = tokenizer
        self._end = np.array([tokenizer.end_id], token_dtype(tokenizer.vocab_size))
        self.documents = 0
        self.bytes = 0

    def write(self, texts: list[str], ends: list[bool]) -> None:
        """Write each text, followed by the end token where its document ends."""
        for ids, end in zip(self._tokenizer.encode_batch(texts), ends, strict=True):
            self._file.write(ids.tobytes())
            if end:
                self._file.write(self._end.tobytes())
        self.documents += len(texts)
        self.bytes += sum(len(text.encode()) for text in texts)


def _write_tokens(
    folder: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer, report: Callable[[str], None]
) -> dict[str, int]:
    """Write train.bin and val.bin; returns the counts of both."""
    num_chars = 0
    with (folder / "train.bin").open("wb") as train_file, (folder / "val.bin").open("wb") as val_file:
        train, val = _TokenWriter(train_file, tokenizer), _TokenWriter(val_file, tokenizer)
        for texts in _batched(corpus.documents()):
            parts = [split.parts(text) for text in texts]
            train.write([head for head, _ in parts if head], [not tail for head, tail in parts if head])
            val.write([tail for _, tail in parts if tail], [True for _, tail in parts if tail])
            num_chars += sum(map(len, texts))
            report(f"tokenising: {num_chars / split.num_chars:.0%}")
    return {
        "train_documents": train.documents,
        "train_bytes": train.bytes,
        "val_documents": val.documents,
        "val_bytes": val.bytes,
    }


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in documents:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
