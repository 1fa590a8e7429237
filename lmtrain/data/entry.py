"""An entry of the cache: the tokens of every source and split, their tokenizer and the manifest, written into a draft.

Owns the order in which they are made. When an entry is wanted, and whether one that is there may be used, is decided in
`prepare`; how tokens are written in `build`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.config.schema import DataConfig, IdsConfig, TokenizerConfig, TokensConfig
from lmtrain.data import checksums
from lmtrain.data.build import ALONE_CHARS, TOKENIZER_FILE, remove_marks, write_tokens
from lmtrain.data.division import place
from lmtrain.data.encoding import has_prompts, special_tokens
from lmtrain.data.sources import Corpus, open_corpus
from lmtrain.data.survey import Survey, stretches, survey, texts_of
from lmtrain.data.tokenizer import TextSample, load_tokenizer, sample_for, train_tokenizer
from lmtrain.errors import DataError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class OpenedSource:
    """One data set of a run, opened: what its part of an entry is made from."""

    name: str  # in a mixture; else empty
    config: DataConfig
    corpus: Corpus
    content: str  # its fingerprint
    make_splits: bool  # whether splits that the data lack are made


def write_entry(
    draft: Path,
    sources: list[OpenedSource],
    config: TokenizerConfig,
    identity: Mapping[str, Any],
    report: Callable[[str], None],
) -> None:
    """Write a complete entry into `draft`, going on with what is there.

    Raises DataError for unusable text, or a vocabulary that it does not allow.
    """
    path = draft / TOKENIZER_FILE
    sample = None if path.exists() else sample_for(config)
    if sample is None and not path.exists():
        _make_tokenizer(path, sources, {}, config, None)
    if any(isinstance(source.config, TokensConfig) for source in sources):
        sources = _cut(sources, config, load_tokenizer(path).end_id)
    surveys: dict[str, Survey] = {}
    num_documents = 0
    for source in sources:
        report(f"reading {source.corpus.name}")
        see = None if sample is None else functools.partial(_add, sample, num_documents)
        surveys[source.name] = survey(source.corpus, source.config, report, see, make_splits=source.make_splits)
        num_documents += len(surveys[source.name].sides)
    if sample is not None:
        report("training the tokenizer")
        _make_tokenizer(path, sources, surveys, config, sample)
    progress = _Progress(sum(found.num_chars for found in surveys.values()), report)
    contents = {}
    for source in sources:
        found = surveys[source.name]
        num_bytes = write_tokens(
            draft,
            source.name,
            found.splits,
            stretches(source.corpus, source.config, found),
            prompts=has_prompts(source.config),
            alone=found.num_chars < ALONE_CHARS,
            report=progress.tell,
        )
        progress.before += found.num_chars
        contents[source.name] = {
            "name": source.corpus.name,
            "num_bytes": num_bytes,
            "left_out": found.left_out,
            "duplicates": found.duplicates,
        }
    remove_marks(draft)
    report("checksums")
    files = checksums.of_files(path for path in sorted(draft.iterdir()) if path.name != MANIFEST)
    corpus = " + ".join(source.corpus.name for source in sources)
    manifest = {"corpus": corpus, "identity": identity, "sources": contents, "files": files}
    (draft / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


class _Progress:
    """How much of all text is tokenised, told in hundredths."""

    def __init__(self, num_chars: int, report: Callable[[str], None]) -> None:
        self.before = 0  # characters of the sources that are done
        self._num_chars = num_chars
        self._report = report
        self._told = ""

    def tell(self, chars: int) -> None:
        message = f"tokenising: {(self.before + chars) / self._num_chars:.0%}"
        if message != self._told:
            self._report(message)
        self._told = message


def _cut(sources: list[OpenedSource], config: TokenizerConfig, end_id: int) -> list[OpenedSource]:
    """Token arrays are cut into documents at the tokenizer's end token, if the settings name no other."""
    if isinstance(config, IdsConfig) and config.end_id is None:
        return sources  # none of their ids is the end
    return [
        replace(source, corpus=open_corpus(replace(source.config, end_id=end_id)))
        if isinstance(source.config, TokensConfig) and source.config.end_id is None
        else source
        for source in sources
    ]


def _add(sample: TextSample, first: int, text: str, number: int) -> None:
    sample.add(text, first + number)


def _make_tokenizer(
    path: Path,
    sources: list[OpenedSource],
    surveys: Mapping[str, Survey],
    config: TokenizerConfig,
    sample: TextSample | None,
) -> None:
    """Save the tokenizer of all sources, made from the `sample` of their documents unless it is given."""
    lines, characters = [], ""
    if sample is not None:
        characters = sample.characters
        sides = np.concatenate([found.sides for found in surveys.values()])
        train = place("train")
        lines = sample.lines(lambda number: sides[number] == train)
        if any(division.cuts for found in surveys.values() for division in found.divisions.values()):
            lines = _lines_before_cuts(sources, surveys, config)
    special = list(dict.fromkeys(name for source in sources for name in special_tokens(source.config)))
    tokenizer = train_tokenizer(config, lines, characters, special)
    if missing := [name for name in special if name not in tokenizer.special]:
        raise DataError(f"the tokenizer {tokenizer.name} has no token {missing[0]}, which conversations need")
    draft = path.with_name(f".{path.name}")
    tokenizer.save(draft)
    draft.replace(path)


def _lines_before_cuts(
    sources: list[OpenedSource], surveys: Mapping[str, Survey], config: TokenizerConfig
) -> list[str]:
    """A sample of the training text where a document is cut: its end is not to be learnt from."""
    sample = sample_for(config)
    assert sample is not None
    for source in sources:
        for stretch in stretches(source.corpus, source.config, surveys[source.name]):
            if stretch.split == "train":
                for text in texts_of(stretch.record):
                    sample.add(text, 0)
    return sample.lines(lambda number: True)
