"""Documents → token ids: what stands between the messages of a conversation, and which tokens a model learns to say.

Knows no files and no splits' meaning; runs in worker processes too, so it imports little.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lmtrain.config.schema import ChatConfig, DataConfig, PairsConfig
from lmtrain.data.documents import TokenArray
from lmtrain.data.prepared import SplitName
from lmtrain.data.records import Conversation, Fragment, Pair, Role
from lmtrain.data.survey import Stretch
from lmtrain.data.tokenizer import ASSISTANT, SYSTEM, TOOL, TURN_END, USER, Tokenizer, token_dtype
from lmtrain.errors import DataError

ROLE_TOKENS: dict[Role, str] = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
"""What a message begins with."""


def special_tokens(data: DataConfig) -> list[str]:
    """The special tokens that documents of these settings need, beside the end of a document."""
    return [*ROLE_TOKENS.values(), TURN_END] if isinstance(data, ChatConfig) else []


def has_prompts(data: DataConfig) -> bool:
    """Whether some tokens are read only, and are no targets."""
    return isinstance(data, ChatConfig | PairsConfig) and data.targets != "all"


@dataclass(frozen=True)
class Encoded:
    """Tokens of consecutive documents of one split."""

    tokens: TokenArray
    ends: NDArray[np.int64]  # after each document that closes, counted from the first of `tokens`
    counted: NDArray[np.bool_] | None
    prompts: NDArray[np.int64] | None  # of each document that closes
    num_bytes: int  # of the text of the targets


@dataclass
class _Collector:
    arrays: list[TokenArray] = field(default_factory=list)
    counted: list[NDArray[np.bool_]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    length: int = 0
    num_bytes: int = 0


class Encoder:
    """Turns stretches of documents into tokens.

    A conversation is `<|role|>content<|turn_end|>` for each message; targets are what the assistant says and the end
    of its turn. A pair is its source, the end token, its target, the end token; targets are the last two. The end
    token follows every whole document.
    """

    def __init__(self, tokenizer: Tokenizer, *, prompts: bool) -> None:
        """With `prompts`, only answers are targets."""
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, batch: Sequence[Stretch]) -> dict[SplitName, Encoded]:
        """The tokens of each split. Raises DataError for text or ids that the tokenizer does not know."""
        if all(isinstance(stretch.record, str) for stretch in batch):
            return self._plain(batch)
        rows = [list(self._parts(stretch)) for stretch in batch]
        texts = [content for row in rows for content, _ in row if isinstance(content, str)]
        encoded = iter(self._tokenizer.encode_batch(texts) if texts else ())
        collectors: dict[SplitName, _Collector] = {}
        for stretch, row in zip(batch, rows, strict=True):
            into = collectors.setdefault(stretch.split, _Collector())
            parts = [(next(encoded) if isinstance(content, str) else content, counts) for content, counts in row]
            self._collect(into, stretch, row, parts)
        return {split: self._encoded(found) for split, found in collectors.items()}

    def _plain(self, batch: Sequence[Stretch]) -> dict[SplitName, Encoded]:
        """The same for texts, of which there may be very many small ones."""
        splits, texts, closes, ends = zip(*batch, strict=True)
        arrays = self._tokenizer.encode_batch(texts)
        encoded: dict[SplitName, Encoded] = {}
        for split in dict.fromkeys(splits):
            chosen = [one == split for one in splits]
            columns = [list(itertools.compress(column, chosen)) for column in (texts, arrays, closes, ends)]
            encoded[split] = self._joined(*columns)
        return encoded

    def _joined(self, texts: list[str], arrays: list[TokenArray], closes: list[bool], ends: list[bool]) -> Encoded:
        has_end = np.array(ends)
        stops = np.cumsum(np.fromiter(map(len, arrays), np.int64, len(arrays)) + has_end)
        tokens = np.full(int(stops[-1]), self._tokenizer.end_id, self._dtype)
        of_text = np.ones(len(tokens), np.bool_)
        of_text[stops[has_end] - 1] = False
        tokens[of_text] = np.concatenate(arrays)
        whole = np.flatnonzero(closes)
        return Encoded(
            tokens=tokens,
            ends=stops[whole],
            counted=np.ones(len(tokens), np.bool_) if self._prompts else None,
            prompts=np.zeros(len(whole), np.int64) if self._prompts else None,
            num_bytes=sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
        )

    def _parts(self, stretch: Stretch) -> Iterator[tuple[str | TokenArray, bool]]:
        """Texts and single tokens in their order, and whether they are targets."""
        record = stretch.record
        assert not isinstance(record, Fragment)
        if isinstance(record, Conversation):
            for message in record.messages:
                answers = message.role == "assistant"
                yield self._special(ROLE_TOKENS[message.role]), False
                yield message.content, answers
                yield self._special(TURN_END), answers
        elif isinstance(record, Pair):
            yield record.source, False
            yield self._token(self._tokenizer.end_id), False
            yield record.target, True
        elif isinstance(record, str):
            yield record, True
        else:
            yield self._checked(record), True
        if stretch.ends:
            yield self._token(self._tokenizer.end_id), not isinstance(record, Conversation)

    def _collect(
        self,
        into: _Collector,
        stretch: Stretch,
        row: list[tuple[str | TokenArray, bool]],
        parts: list[tuple[TokenArray, bool]],
    ) -> None:
        before = into.length
        prompt: int | None = None
        for ids, counts in parts:
            if counts and prompt is None:
                prompt = into.length - before
            into.arrays.append(ids)
            into.length += len(ids)
            if self._prompts:
                into.counted.append(np.full(len(ids), counts))
        for content, counts in row:
            if isinstance(content, str) and (counts or not self._prompts):
                into.num_bytes += len(content) if content.isascii() else len(content.encode())
        if not isinstance(stretch.record, str | Pair | Conversation | Fragment):
            into.num_bytes += self._bytes_of(parts[0][0])
        if stretch.closes:
            into.ends.append(into.length)
            into.prompts.append(prompt or 0)

    def _encoded(self, found: _Collector) -> Encoded:
        return Encoded(
            tokens=np.concatenate(found.arrays).astype(self._dtype, copy=False),
            ends=np.array(found.ends, np.int64),
            counted=np.concatenate(found.counted) if self._prompts else None,
            prompts=np.array(found.prompts, np.int64) if self._prompts else None,
            num_bytes=found.num_bytes,
        )

    def _special(self, name: str) -> TokenArray:
        return self._token(self._tokenizer.special[name])

    def _token(self, number: int) -> TokenArray:
        return np.array([number], self._dtype)

    def _checked(self, ids: NDArray[np.integer]) -> TokenArray:
        known = getattr(self._tokenizer, "num_ids", self._tokenizer.vocab_size)
        if len(ids) and int(ids.max()) >= known:
            raise DataError(
                f"the token arrays hold the id {int(ids.max()):,}, beyond the vocabulary of {known:,} "
                f"({self._tokenizer.name}): choose the tokenizer that made them"
            )
        return ids.astype(self._dtype)

    def _bytes_of(self, ids: TokenArray) -> int:
        """UTF-8 bytes that ids stand for; 0 if they stand for no text."""
        return 0 if self._tokenizer.name == "ids" else len(self._tokenizer.decode(ids.tolist()).encode())
