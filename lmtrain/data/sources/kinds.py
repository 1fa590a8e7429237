"""What each kind of source takes: which files of a folder, and the reader of each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtrain.config.schema import (
    ChatConfig,
    FilesConfig,
    PairsConfig,
    RecordsConfig,
    TextConfig,
    TokensConfig,
)
from lmtrain.data.prepared import SplitName
from lmtrain.data.sources import arrays, rows
from lmtrain.data.sources.arrays import ArrayReader
from lmtrain.data.sources.blocks import without_compression
from lmtrain.data.sources.corpus import Reader
from lmtrain.data.sources.fields import ChatField, Fields, PairFields, TextField
from lmtrain.data.sources.files import LocalFile, SourceFile
from lmtrain.data.sources.finding import Wanted, find
from lmtrain.data.sources.hub import HubData
from lmtrain.data.sources.pairs import AlignedReader, counterpart, has_ending
from lmtrain.data.sources.rows import RecordReader, format_of
from lmtrain.data.sources.text import TextReader
from lmtrain.errors import DataError


@dataclass(frozen=True)
class Kind:
    """How a kind of source reads its files."""

    wanted: Wanted
    read: Callable[[SourceFile, SplitName], Reader]  # raises DataError for a file of another kind
    read_hub: Callable[[SourceFile, HubData], Reader]


def kind_of(config: FilesConfig, downloads: Path) -> Kind:
    """The kind of these settings; addresses that it needs are kept in `downloads`."""
    match config:
        case TextConfig():
            return _text(config)
        case RecordsConfig():
            return _records(TextField(config.field))
        case ChatConfig():
            return _records(ChatField(config.field))
        case PairsConfig():
            return _pairs(config, downloads)
        case TokensConfig():
            return _tokens(config)
    raise TypeError(f"no source for {type(config).__name__}")


def _text(config: TextConfig) -> Kind:
    def read(file: SourceFile, split: SplitName) -> Reader:
        return TextReader(file, config.document)

    def read_hub(file: SourceFile, data: HubData) -> Reader:
        if data.builder != "text":
            raise DataError(
                f"{data.name(config)} holds records ({data.builder}), not text files: read it by data=jsonl "
                f"data.path=null data.hub={config.hub or 'OWNER/NAME'}, or a local copy by data=jsonl data.path=PATH"
            )
        return TextReader(file, config.document)

    def choose(paths: Sequence[Path]) -> list[Path]:
        return [path for path in paths if without_compression(path.name).endswith(".txt")]

    return Kind(Wanted("no *.txt file", choose, hidden=True), read, read_hub)


def _choose_records(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if format_of(path.name)]


def _records(fields: Fields) -> Kind:
    def read(file: SourceFile, split: SplitName) -> Reader:
        if (kind := format_of(file.name)) is None:
            raise DataError(
                f"{file.name} is of no known format: records are read from {', '.join(rows.SUFFIXES)}, "
                "also compressed; plain text by data=text"
            )
        return RecordReader(file, fields, kind)

    return Kind(_wanted(tuple(rows.SUFFIXES), _choose_records), read, _hub_reader(fields))


def _hub_reader(fields: Fields) -> Callable[[SourceFile, HubData], Reader]:
    def read_hub(file: SourceFile, data: HubData) -> Reader:
        kind = format_of(file.name) or f"datasets {data.builder}"
        # `delimiter` is another name of `sep`, and comes with it.
        options = {name: value for name, value in data.options.items() if name != "delimiter"}
        if set(options) - {"sep"}:
            kind = f"datasets {data.builder}"  # which knows what its options mean
        return RecordReader(file, fields, kind, options)

    return read_hub


def _wanted(suffixes: Sequence[str], choose: Callable[[Sequence[Path]], list[Path]]) -> Wanted:
    return Wanted(f"no file of a known kind ({', '.join(suffixes)})", choose)


def _pairs(config: PairsConfig, downloads: Path) -> Kind:
    fields = PairFields(config.source, config.target)
    fields.check()
    answers = {"train": config.target_path, "val": config.val_target_path, "test": config.test_target_path}
    for name, path in (("val", config.val_path), ("test", config.test_path)):
        if answers[name] is not None and path is None:
            raise DataError(f"data.{name}_target_path answers a data.{name}_path, which is not set")

    def choose(paths: Sequence[Path]) -> list[Path]:
        return [path for path in paths if has_ending(path.name, config.source)] or _choose_records(paths)

    def read(file: SourceFile, split: SplitName) -> Reader:
        if path := answers[split]:
            setting = "data.target_path" if split == "train" else f"data.{split}_target_path"
            found = find(path, setting, _wanted((), lambda paths: list(paths)), downloads).files
            if len(found) != 1:
                raise DataError(f"{setting}={path} must name one file, found {len(found)}")
            return AlignedReader(file, found[0])
        if has_ending(file.name, config.source):
            return AlignedReader(file, _beside(file, config.source, config.target))
        if has_ending(file.name, config.target):
            return AlignedReader(_beside(file, config.target, config.source), file)
        if kind := format_of(file.name):
            return RecordReader(file, fields, kind)
        raise DataError(
            f"{file.name} holds no pairs: they are read from {', '.join(rows.SUFFIXES)} (also compressed), "
            f"from two files whose names end in .{config.source} and .{config.target}, or with data.target_path=PATH"
        )

    return Kind(_wanted((*rows.SUFFIXES, f".{config.source}"), choose), read, _hub_reader(fields))


def _beside(file: SourceFile, ending: str, other: str) -> SourceFile:
    found = counterpart(file, ending, other) if isinstance(file, LocalFile) else None
    if found is None:
        raise DataError(f"{file.name} has no file beside it that ends in .{other}; name it by data.target_path=PATH")
    return found


def _tokens(config: TokensConfig) -> Kind:
    def choose(paths: Sequence[Path]) -> list[Path]:
        return [path for path in paths if path.suffix in arrays.SUFFIXES]

    def read(file: SourceFile, split: SplitName) -> Reader:
        if not choose([Path(file.name)]):
            raise DataError(f"{file.name} is no array of token ids: they are read from {', '.join(arrays.SUFFIXES)}")
        return ArrayReader(file, config.dtype, config.end_id)

    def read_hub(file: SourceFile, data: HubData) -> Reader:
        raise DataError(f"{data.name(config)} holds records, not token arrays: name files by data.path=PATH")

    return Kind(_wanted(arrays.SUFFIXES, choose), read, read_hub)
