"""What a tokenizer is trained on, gathered in one pass over a corpus in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lmtrain.config.schema import CharConfig, SentencePieceConfig, TokenizerConfig
from lmtrain.data.tokenizer.interface import utf8

# SentencePiece leaves training lines of more than 4,192 bytes out; a character has at most four.
_MAX_LINE_CHARS = 1000
_CODE_POINTS = 0x110000


class TextSample:
    """Lines spread evenly over the documents that are added, and every character that occurs in them.

    Keeps every line at first; whenever there are too many, every second kept line is dropped and the stride doubled. So
    one pass and a bounded memory do for a corpus of any size.
    """

    def __init__(self, sample_bytes: int | None, characters: bool) -> None:
        """Lines of at most `sample_bytes` of UTF-8 together, or none (None); the characters if asked for."""
        self._sample_bytes = sample_bytes
        self._lines: list[str] = []
        self._keys: list[int] = []  # of each line
        self._num_bytes = 0
        self._num_lines = 0  # seen so far
        self._stride = 1
        self._occurs = np.zeros(_CODE_POINTS if characters else 0, np.bool_)

    def add(self, text: str, key: int) -> None:
        """Take a text of the document `key` in. Raises DataError for what is no Unicode text."""
        utf8(text)
        if len(self._occurs):
            self._occurs[np.frombuffer(text.encode("utf-32-le"), np.uint32)] = True
        if self._sample_bytes is None:
            return
        lines = _short_lines(text)
        position = -self._num_lines % self._stride
        while position < len(lines):
            self._keep(lines[position], key)
            position += 1
            position += -(self._num_lines + position) % self._stride
        self._num_lines += len(lines)

    def _keep(self, line: str, key: int) -> None:
        self._lines.append(line)
        self._keys.append(key)
        self._num_bytes += _num_bytes(line)
        assert self._sample_bytes is not None
        while self._num_bytes > self._sample_bytes and len(self._lines) > 1:
            self._lines, self._keys = self._lines[::2], self._keys[::2]
            self._stride *= 2
            self._num_bytes = sum(map(_num_bytes, self._lines))

    def lines(self, keep: Callable[[int], bool]) -> list[str]:
        """The lines of the documents whose key is to be kept."""
        return [line for line, key in zip(self._lines, self._keys, strict=True) if keep(key)]

    @property
    def characters(self) -> str:
        """Every character of all texts, in the order of their code points."""
        return np.flatnonzero(self._occurs).astype("<u4").tobytes().decode("utf-32-le")


def sample_for(config: TokenizerConfig) -> TextSample | None:
    """What is to be gathered to make the tokenizer; None if it needs no text."""
    match config:
        case SentencePieceConfig():
            # Without bytes every character that is to be known needs a piece, whether a sample holds it or not.
            return TextSample(config.sample_bytes, characters=not config.byte_fallback)
        case CharConfig():
            return TextSample(None, characters=True)
    return None


def _short_lines(text: str) -> list[str]:
    lines = [line for line in text.split("\n") if line]
    if max(map(len, lines), default=0) <= _MAX_LINE_CHARS:
        return lines
    return [line[start : start + _MAX_LINE_CHARS] for line in lines for start in range(0, len(line), _MAX_LINE_CHARS)]


def _num_bytes(line: str) -> int:
    return len(line) if line.isascii() else len(line.encode())
