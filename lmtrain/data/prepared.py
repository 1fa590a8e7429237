"""Text as a run uses it: the tokens of every source and split, and the tokenizer they were made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmtrain.data.documents import Documents
from lmtrain.data.tokenizer import Tokenizer

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
SPLIT_WORDS: dict[SplitName, str] = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """The documents of one split of one source."""

    documents: Documents
    num_bytes: int  # UTF-8 bytes of the text that the targets stand for


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """One data set: a run has one, or those of a mixture."""

    name: str  # in words, such as "Python 3.11 standard library"
    weight: float  # share of the sequences, beside those of the other sources
    splits: Mapping[SplitName, PreparedSplit]  # train and val, and test if there is one
    left_out: Mapping[str, int]  # documents that are in no split, by the reason
    duplicates: int  # documents equal to an earlier one
    deduplicated: bool  # whether those are left out
    content: str  # fingerprint of its text alone
    fingerprint: str  # follows from the content, the split and the tokenizer: equal means equal tokens
    folder: Path  # its entry in the cache
    built: bool  # False: found in the cache


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Everything a run trains and validates on."""

    sources: tuple[PreparedSource, ...]
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """All sources in words."""
        return " + ".join(source.name for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Equal means equal tokens in equal shares."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        shares = [f"{source.fingerprint} {source.weight!r}" for source in self.sources]
        return hashlib.sha256("\n".join(shares).encode()).hexdigest()[:32]

    @property
    def texts(self) -> dict[str, str]:
        """The fingerprint of the text of each source: runs compare only if those of one name are equal."""
        return {source.name: source.content for source in self.sources}

    def documents(self, split: SplitName) -> list[Documents]:
        """The documents of a split, source by source; none of sources without it."""
        return [source.splits[split].documents for source in self.sources if split in source.splits]

    def bytes_per_target(self, split: SplitName) -> float:
        """Turns nats a token into nats a byte. End tokens count, as the model has to predict them too."""
        splits = [source.splits[split] for source in self.sources if split in source.splits]
        return sum(one.num_bytes for one in splits) / sum(one.documents.num_targets for one in splits)
