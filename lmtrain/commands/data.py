"""`lmtrain data`: look at the text a run trains on, as its model sees it, and free the cache of prepared text.

  lmtrain data inspect [RUN] [key=value ...]           counts, lengths, cache and samples of the text
  lmtrain data inspect [RUN] --step N [key=value ...]  the batch of optimizer step N
  lmtrain data clean-cache [--dry-run | --yes]         delete prepared text; it is prepared again when needed

The text is that of RUN, a run folder or a model of the store, or of the settings as for training.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lmtrain.commands import CommandParser, run_verb
from lmtrain.config.compose import compose_config
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.cache import (
    cache_folder,
    list_entries,
    remove_downloads,
    remove_entry,
    remove_fingerprints,
    size_of_downloads,
)
from lmtrain.data.documents import Piece, TokenArray
from lmtrain.data.prepare import prepare
from lmtrain.data.prepared import SPLIT_WORDS, PreparedData, PreparedSource
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import ConfigError
from lmtrain.run_dir import RunDir
from lmtrain.store import find_run

SHOWN_TOKENS = 100
"""Of one piece of a document, without --full."""
QUANTILES = {"shortest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "longest": 1.0}


def main(arguments: list[str]) -> int:
    """Run `inspect` or `clean-cache`; exit status 0. Raises LmtrainError for what cannot be done."""
    return run_verb("data", __doc__, {"inspect": inspect, "clean-cache": clean_cache}, arguments)


# ------------------------------------------------------------------------------------------- inspect


def inspect(arguments: list[str]) -> None:
    """Print what the training text is like, or the batch of one step."""
    parser = CommandParser("data inspect", "Look at the text a run trains on, decoded from the tokens.")
    parser.add_argument("words", nargs="*", metavar="[RUN] key=value", help="a run folder, settings as for training")
    parser.add_argument("--step", type=int, metavar="N", help="the batch of optimizer step N as the logs count, from 1")
    parser.add_argument("--samples", type=int, default=3, metavar="K", help="documents to show (default 3)")
    parser.add_argument("--full", action="store_true", help=f"show all of a text, not {SHOWN_TOKENS} tokens")
    options = parser.parse_intermixed_args(arguments)
    if options.samples < 0:
        parser.error(f"--samples must not be negative, got {options.samples}")
    run, overrides = _split_words(options.words)
    config = compose_config(overrides, run)
    with Console(stderr=True).status("preparing") as status:
        data = prepare(config.data, config.tokenizer, on_progress=status.update)
    if run is not None:
        _warn_of_other_text(RunDir(run), data)
    if options.step is not None:
        _show_step(config, data, options.step, options.full)
    else:
        for source in data.sources:
            _show_counts(source, data.tokenizer)
            _show_lengths(source.splits["train"].documents.lengths)
            _show_samples(source, data.tokenizer, options.samples, config.seed, options.full)


def _split_words(words: list[str]) -> tuple[Path | None, list[str]]:
    """A first word that sets nothing names a run."""
    if words and (("=" not in words[0] and words[0][0] not in "~+") or Path(words[0]).is_dir()):
        return find_run(words[0]).folder, words[1:]
    return None, words


def _warn_of_other_text(run: RunDir, data: PreparedData) -> None:
    result = run.read_result()
    if result is not None and result.get("data_fingerprint", data.fingerprint) != data.fingerprint:
        print(f"note: {run} was trained on other tokens: its text or its settings have changed\n", file=sys.stderr)


def _show_counts(source: PreparedSource, tokenizer: Tokenizer) -> None:
    table = Table(title=escape(source.name), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    columns = []
    for name, split in source.splits.items():
        table.add_column(SPLIT_WORDS[name], justify="right")
        tokens, targets = len(split.documents.tokens), split.documents.num_targets
        columns.append(
            {
                "documents": f"{len(split.documents):,}",
                "tokens": f"{tokens:,}",
                **({"... that are targets": f"{targets:,}"} if split.documents.counted is not None else {}),
            }
        )
        if split.num_bytes:  # ids may stand for no text
            what = "token" if targets == tokens else "target"
            columns[-1] |= {
                f"bytes of {what}s": f"{split.num_bytes:,}",
                f"bytes per {what}": f"{split.num_bytes / targets:.3f}",
            }
    for heading in columns[0]:
        table.add_row(heading, *(column[heading] for column in columns))
    Console().print(table)
    size = sum(path.stat().st_size for path in source.folder.iterdir())
    print(f"tokenizer   {tokenizer.name}, vocabulary {tokenizer.vocab_size:,}")
    for reason, count in source.left_out.items():
        print(f"left out    {count:,} documents: {reason}")
    if not source.deduplicated:
        print(f"duplicates  {source.duplicates:,} documents equal to an earlier one, kept on its side of the split")
    print(f"cache       {source.folder} ({_megabytes(size)}, {'built now' if source.built else 'found there'})")


def _show_lengths(lengths: NDArray[np.int64]) -> None:
    """Quantiles, and a histogram whose bins double."""
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
    table = Table(title="training documents by tokens", title_justify="left", box=box.SIMPLE_HEAD)
    for name in (*QUANTILES, "mean"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{int(value):,}" for value in quantiles), f"{lengths.mean():,.0f}")
    doublings = np.frexp(lengths)[1] - 1  # of 1 token: the exponent of the largest power of two not above
    counts = np.bincount(doublings)
    bars = Table.grid(padding=(0, 1))
    for doubling in range(int(doublings.min()), len(counts)):
        count = int(counts[doubling])
        span = f"{1 << doubling:,} to {(2 << doubling) - 1:,}"
        bars.add_row(f"  {span:>21}", f"{count:>9,}", Bar(float(counts.max()), 0, count, width=40))
    console = Console()
    console.print()
    console.print(table, bars)


def _show_samples(source: PreparedSource, tokenizer: Tokenizer, number: int, seed: int, full: bool) -> None:
    documents = source.splits["train"].documents
    for chosen in sorted(random.Random(seed).sample(range(len(documents)), min(number, len(documents)))):
        document = documents[chosen]
        print(f"\ndocument {chosen:,} of {len(documents):,}: {_count(len(document.ids), 'token')}")
        _print_pieces([document], tokenizer, len(documents), full)


def _show_step(config: ExperimentConfig, data: PreparedData, step: int, full: bool) -> None:
    from lmtrain.feeding import count_steps, train_batches  # not at the top: torch

    batches = train_batches(config, data)
    num_steps = count_steps(config, batches)
    if not 1 <= step <= num_steps:
        raise ConfigError(f"--step must be one of the run's steps, 1 to {num_steps}, got {step}")
    rows, sequences, sources = batches.rows(step - 1), batches.sequences(step - 1), data.documents("train")
    for source, documents in zip(data.sources, sources, strict=True):
        print(f"{source.name}: {_count(len(documents), 'training document')}, {_count(len(documents.tokens), 'token')}")
    if batches.note:
        print(batches.note)
    shortest, longest = int(rows.lengths.min()), int(rows.lengths.max())
    shape = f"{_count(len(rows), 'row')} of {f'{shortest} to ' * (shortest < longest)}{_count(longest, 'token')}"
    numbers = "" if config.data.batches == "padded" else f", {_numbers('sequence', sequences[0], sequences[-1])}"
    print(f"step {step:,} of {num_steps:,}: {shape}{numbers}, epoch {1 + sequences[0] // batches.epoch_size}")
    print("Rows, sequences, documents and tokens count from 0. A text is the inputs of its row and the last target.")
    mark = "|"
    if any(documents.counted is not None for documents in sources):
        mark = ">"
        print("Text after > is what the model learns to say, text after | is only read.")
    for row, (number, start, length) in enumerate(rows):
        pieces = sources[number].pieces(np.arange(start, start + length + 1))
        different = len(np.unique(np.concatenate([piece.ids for piece in pieces])))
        name = f"{data.sources[number].name}, " if len(sources) > 1 else ""
        print(f"\nrow {row}: {name}{_places(pieces)}, {different} of them different")
        _print_pieces(pieces, data.tokenizer, len(sources[number]), full, mark)


def _places(pieces: list[Piece]) -> str:
    """Document numbers and token positions of a row, such as `documents 3 to 5, tokens 90 to 154`."""
    first, last = pieces[0], pieces[-1]
    end = last.start + len(last.ids) - 1
    return f"{_numbers('document', first.document, last.document)}, {_numbers('token', first.start, end)}"


def _numbers(what: str, first: int, last: int) -> str:
    return f"{what} {first:,}" if first == last else f"{what}s {first:,} to {last:,}"


def _print_pieces(pieces: list[Piece], tokenizer: Tokenizer, num_documents: int, full: bool, mark: str = "|") -> None:
    """Texts with the number of their document at the margin, and > before targets; `mark` where all tokens are."""
    width = len(str(num_documents))
    for piece in pieces:
        num_shown = len(piece.ids) if full else SHOWN_TOKENS
        margins = _margins(str(piece.document), width)
        for ids, sign in _marked(piece, num_shown, mark):
            for line in _printable(_decoded(ids, tokenizer)).split("\n"):
                print(f"  {next(margins)} {sign} {line}")
        if num_shown < len(piece.ids):
            print(f"  {'':>{width}} … {_count(len(piece.ids) - num_shown, 'more token')}, shown by --full")


def _marked(piece: Piece, num_shown: int, mark: str) -> Iterator[tuple[TokenArray, str]]:
    """The first tokens of a piece, cut where targets begin or end, each part with its mark."""
    if piece.counted is None:
        yield piece.ids[:num_shown], mark
        return
    counted = piece.counted[:num_shown]
    cuts = [0, *(1 + np.flatnonzero(np.diff(counted))), len(counted)]
    for start, stop in itertools.pairwise(cuts):
        yield piece.ids[start:stop], ">" if counted[start] else "|"


def _decoded(ids: TokenArray, tokenizer: Tokenizer) -> str:
    """The text of ids, with the names of special tokens."""
    names = {number: name for name, number in tokenizer.special.items()}
    cuts = np.flatnonzero(np.isin(ids, list(names)))
    parts = np.split(ids, cuts)
    texts = [names.get(int(part[0]), "") if len(part) else "" for part in parts]
    return "".join(name + tokenizer.decode(part.tolist()) for name, part in zip(texts, parts, strict=True))


def _margins(number: str, width: int) -> Iterator[str]:
    yield number.rjust(width)
    while True:
        yield " " * width


def _printable(text: str) -> str:
    """Control characters other than line ends by their escapes: text must not steer the terminal."""
    return "".join(
        character if character == "\n" or character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


# ------------------------------------------------------------------------------------------- clean-cache


def clean_cache(arguments: list[str]) -> None:
    """Delete every entry of the cache but those being built, after asking."""
    parser = CommandParser("data clean-cache", "Delete prepared text. Runs prepare it again when they need it.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.cache_dir=FOLDER: another cache")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--yes", action="store_true", help="do not ask")
    choice.add_argument("--dry-run", action="store_true", help="only show what would be deleted")
    options = parser.parse_intermixed_args(arguments)
    cache = cache_folder(compose_config(options.overrides).data)
    entries = list_entries(cache)
    for entry in entries:
        print(f"{_megabytes(entry.num_bytes):>12}  {entry.folder.name}  {entry.corpus or 'not whole'}")
    downloads = size_of_downloads(cache)
    if downloads:
        print(f"{_megabytes(downloads):>12}  fetched from addresses")
    total = _megabytes(sum(entry.num_bytes for entry in entries) + downloads)
    print(f"{total:>12}  in {_count(len(entries), 'prepared text')} of {cache}")
    if options.dry_run or not ((entries or downloads) and (options.yes or _confirmed())):
        return
    kept = [entry for entry in entries if not remove_entry(entry)]
    remove_fingerprints(cache)
    remove_downloads(cache)
    freed = sum(entry.num_bytes for entry in entries if entry not in kept) + downloads
    print(f"freed {_megabytes(freed)}" + (f"; kept {len(kept)} that another process is building" if kept else ""))


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("clean-cache asks before it deletes, and there is no terminal; add --yes or --dry-run")
    return input("delete them? [y/N] ").strip().lower() in ("y", "yes")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f} MB"
