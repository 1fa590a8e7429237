"""Settings of data sets: where documents come from, which are kept, and how batches are made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from lmtrain.config.schema.rules import REQUIRED, require, require_fraction, require_positive


@dataclass(kw_only=True)
class DataConfig:
    """What every data set has in common."""

    seq_len: int = REQUIRED  # tokens a sequence: the context the model is trained at
    batches: Literal["packed", "packed_documents", "padded"] = "packed"
    """Windows over the stream of documents; the same without seeing across their ends; or a document a row."""
    val_fraction: float = 0.1  # share of the text kept for validation, unless the data have a split of their own
    test_fraction: float = 0.0  # ... and for a test set that no run looks at
    split: Literal["auto", "document", "tail"] = "auto"  # by whole documents, or the end of the text
    min_chars: int = 1  # shorter documents are left out
    max_documents: int | None = None  # use only the first so many of each split; None: all
    deduplicate: bool = False  # leave out documents equal to an earlier one
    on_bad_record: Literal["error", "skip"] = "error"  # a record that cannot be read: stop, or leave it out and count
    weight: float = 1.0  # share of the sequences, as one of the sources of a mixture
    cache_dir: str | None = None  # where prepared tokens are kept; None: the user's cache folder

    def __post_init__(self) -> None:
        require_positive("data.", seq_len=self.seq_len, max_documents=self.max_documents, weight=self.weight)
        require(self.min_chars >= 0, f"data.min_chars must not be negative, got {self.min_chars}")
        require(0 < self.val_fraction < 1, f"data.val_fraction must lie between 0 and 1, got {self.val_fraction}")
        require_fraction("data.", test_fraction=self.test_fraction)
        together = self.val_fraction + self.test_fraction
        require(
            together < 1,
            f"data.val_fraction and data.test_fraction must leave text to train on, got {together:g} together",
        )


@dataclass(kw_only=True)
class PythonStdlibConfig(DataConfig):
    """The source files of this Python's standard library, one document a file."""


@dataclass(kw_only=True)
class FilesConfig(DataConfig):
    """Files of this machine, of an address, or of a data set on the Hugging Face Hub."""

    path: str | None = REQUIRED  # a file, a folder, a glob or a URL; null: the data set `hub`
    val_path: str | None = None  # the same for validation, if it is apart
    test_path: str | None = None
    hub: str | None = None  # data set on the Hub, as OWNER/NAME; `path` may name a local copy
    hub_config: str | None = None  # which of its configurations
    hub_split: str | None = None  # which of its splits to train on, if none is called train
    revision: str | None = None  # branch, tag or commit; None: the newest when it was first used

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.path is not None or self.hub is not None,
            "data.path must name a file, a folder, a glob or a URL, or data.hub a data set of the Hub",
        )


@dataclass(kw_only=True)
class TextConfig(FilesConfig):
    """UTF-8 text."""

    document: Literal["file", "paragraph", "line"] = "file"  # what counts as one document


@dataclass(kw_only=True)
class RecordsConfig(FilesConfig):
    """JSON, JSON lines, CSV, TSV or Parquet: a document a record."""

    field: str | None = None  # field or column that holds the text; None: the first of text, content, message, …


@dataclass(kw_only=True)
class ChatConfig(FilesConfig):
    """Conversations: records with a list of messages, each with a role and a content."""

    field: str = "messages"  # field that holds the list
    targets: Literal["assistant", "all"] = "assistant"  # what the model learns to say


@dataclass(kw_only=True)
class PairsConfig(FilesConfig):
    """Sources and what they become, such as sentences and their translations.

    Records with two fields, or two files whose lines belong together.
    """

    source: str = REQUIRED  # field, column or ending of the file name (de for train.de); or a template, "{a} {b}"
    target: str = REQUIRED
    target_path: str | None = None  # file whose lines answer those of `path`, if the names do not tell
    val_target_path: str | None = None
    test_target_path: str | None = None
    targets: Literal["target", "all"] = "target"  # what the model learns to say


@dataclass(kw_only=True)
class TokensConfig(FilesConfig):
    """Arrays of token ids made elsewhere: .npy, .npz or raw .bin."""

    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"  # of a .bin, which does not say
    end_id: int | None = None  # the id that ends a document; None: the tokenizer's


@dataclass(kw_only=True)
class MixtureConfig(DataConfig):
    """Several data sets, a sequence of one or of another in fixed shares.

    Of each source, `seq_len`, `batches` and `cache_dir` are those of the mixture.
    """

    sources: dict[str, DataConfig] = dataclasses.field(default_factory=dict)  # name → data set, with its `weight`

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.sources), "data.sources is empty: add one such as +data@data.sources.NAME=text")
        for name, source in self.sources.items():
            require(name.isidentifier(), f"data.sources: {name!r} must be a plain name")
            require(not isinstance(source, MixtureConfig), f"data.sources.{name} is a mixture itself")


def is_of_pairs(data: DataConfig) -> bool:
    """Whether every document is a source and its target."""
    if isinstance(data, MixtureConfig):
        return all(is_of_pairs(source) for source in data.sources.values())
    return isinstance(data, PairsConfig)
