"""The records that prepared documents were made of, for what must not have gone through a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from lmtrain.config.schema import DataConfig
from lmtrain.data.prepared import SplitName
from lmtrain.data.records import Record
from lmtrain.data.sources import open_corpus
from lmtrain.data.survey import stretches, survey


def read_records(data: DataConfig, split: SplitName, *, make_splits: bool = True) -> Iterator[Record]:
    """The documents of a split in their order, a long one or one that is cut in pieces; `make_splits` as in `prepare`.

    Reads the text twice. Raises DataError for what cannot be read.
    """
    corpus = open_corpus(data)
    found = survey(corpus, data, lambda message: None, make_splits=make_splits)
    return (stretch.record for stretch in stretches(corpus, data, found) if stretch.split == split)
