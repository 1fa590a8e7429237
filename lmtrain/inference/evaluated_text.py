"""The text that a trained model is evaluated on, in the ids of the tokenizer it was trained with.

Owns which documents these are. Knows no model; the losses are in `evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lmtrain.config.evaluation import EvaluationSettings
from lmtrain.config.schema import DataConfig, MixtureConfig, SavedTokenizerConfig, TokensConfig
from lmtrain.data.documents import Documents
from lmtrain.data.original import read_records
from lmtrain.data.prepare import find_prepared, prepare
from lmtrain.data.prepared import SPLITS, PreparedData, SplitName
from lmtrain.data.records import Pair
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError
from lmtrain.run_dir import RunDir

Split = Literal["train", "val", "test", "all"]
SPLIT_CHOICES: tuple[Split, ...] = (*SPLITS, "all")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The documents of one split of one source."""

    source: str  # its name in a mixture; else empty
    config: DataConfig  # of the source
    split: SplitName
    documents: Documents
    num_bytes: int  # UTF-8 bytes of the text that the targets stand for


@dataclass(frozen=True, kw_only=True)
class EvaluatedText:
    """What is evaluated."""

    name: str  # in words
    split: Split
    parts: tuple[Part, ...]
    notes: tuple[str, ...]  # what is to be known of it, a line each
    has_made_splits: bool  # False: the splits are those that the data have of their own

    @property
    def num_documents(self) -> int:
        return sum(len(part.documents) for part in self.parts)

    @property
    def num_targets(self) -> int:
        """Tokens that are targets, whether a model is asked for each of them or not."""
        return sum(part.documents.num_targets for part in self.parts)

    def bytes_per_target(self, source: str | None = None) -> float:
        """As `PreparedData.bytes_per_target`; of one source, or of all (None)."""
        parts = [part for part in self.parts if source in (None, part.source)]
        return sum(part.num_bytes for part in parts) / sum(part.documents.num_targets for part in parts)

    def pairs(self, part: Part) -> Iterator[Pair]:
        """The pairs behind the documents of a part, in their order. Raises DataError if the text has changed."""
        records = read_records(part.config, part.split, make_splits=self.has_made_splits)
        for number, record in enumerate(records):
            if number == len(part.documents):
                break
            assert isinstance(record, Pair)
            yield record


def open_text(
    run: RunDir,
    settings: EvaluationSettings,
    tokenizer: Tokenizer,
    split: Split | None,
    on_progress: Callable[[str], None] | None = None,
) -> EvaluatedText:
    """Find the text in the cache, or prepare it with the `tokenizer` of the run, and never with another.

    `split` None: `val`; of other text than the run's, all of it unless that has a validation split of its own. With
    `all`, documents are whole: nothing is divided. Raises DataError for unusable text, or a split that it lacks.
    """
    data = settings.config.data
    configs = {"": data}
    if isinstance(data, MixtureConfig):
        configs = {name: replace(one, cache_dir=data.cache_dir) for name, one in data.sources.items()}
    if tokenizer.name == "ids" and not all(isinstance(config, TokensConfig) for config in configs.values()):
        raise DataError(f"{run} was trained on ids alone, without a tokenizer to read text with: give it data=tokens")
    make_splits = split != "all" and not (split is None and settings.other_text)
    prepared = _prepare(run, settings, tokenizer, make_splits, on_progress)
    if split is None:
        given = not settings.other_text or all("val" in source.splits for source in prepared.sources)
        split = "val" if given else "all"
    parts = tuple(
        Part(source=name, config=config, split=one, documents=found.documents, num_bytes=found.num_bytes)
        for (name, config), source in zip(configs.items(), prepared.sources, strict=True)
        for one, found in source.splits.items()
        if split in (one, "all")
    )
    if not parts:
        there = dict.fromkeys(one for source in prepared.sources for one in source.splits)
        raise DataError(f"{prepared.name} has no {split} split; there are {', '.join([*there, 'all'])}")
    return EvaluatedText(
        name=prepared.name,
        split=split,
        parts=parts,
        notes=(*_left_out(prepared), *_changes(run, settings, split, prepared)),
        has_made_splits=make_splits,
    )


def _prepare(
    run: RunDir,
    settings: EvaluationSettings,
    tokenizer: Tokenizer,
    make_splits: bool,
    on_progress: Callable[[str], None] | None,
) -> PreparedData:
    config = settings.config
    if make_splits:
        try:
            found = find_prepared(config.data, config.tokenizer)  # what was made for training, most likely
        except DataError:  # a tokenizer whose file is gone
            found = None
        if found is not None and found.tokenizer.fingerprint == tokenizer.fingerprint:
            return found
    saved = SavedTokenizerConfig(path=str(run.tokenizer))
    return prepare(config.data, saved, on_progress, make_splits=make_splits)


def _left_out(prepared: PreparedData) -> Iterator[str]:
    for source in prepared.sources:
        for reason, count in source.left_out.items():
            if count:
                yield f"left out of {source.name}: {count:,} documents: {reason}"


def _changes(run: RunDir, settings: EvaluationSettings, split: Split, prepared: PreparedData) -> Iterator[str]:
    """Why numbers of the run's own text are not those of its training."""
    if settings.other_text:
        return
    texts = (run.read_result() or {}).get("texts", {})
    if texts and sorted(texts.values()) != sorted(prepared.texts.values()):
        yield f"the text has changed since {run} was trained on it: the numbers are not those of its metrics"
    elif settings.other_documents and split in ("val", "test"):
        yield f"the text is divided otherwise than for training: {split} may hold what was trained on"
