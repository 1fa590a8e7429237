"""Byte-pair encoding at the speed of memory: words are encoded once and looked up after that.

Bytes that stand side by side in no piece of a vocabulary are never merged. So text may be cut between them, and the ids
of the parts are those of the whole. Such parts (mostly words, with the spaces before them) repeat.

Owns where text is cut and what is remembered. Does not encode: it is given a function that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.documents import TokenArray

_WIDTH = 16  # bytes of the longest word that has a slot
_SLOTS = 1 << 18
_MAX_WORDS = 1 << 18  # remembered, at about 200 bytes each
_MAX_IDS = 1 << 21  # ... of all of them
_CHUNK = 1 << 16  # words looked up at once
_WINDOW = 1 << 18  # bytes cut at once

_Positions = NDArray[np.int64]
_Keys = NDArray[np.uint64]


class WordEncoder:
    """Encodes text word by word, exactly as `encode` does whole texts; remembers words in bounded memory.

    Remembered words are numbered. A short one is found by its slot, which its bytes give, until another word takes the
    slot: that is a few operations on arrays for all words at once. The rest are found in a dictionary. When there are
    too many, all are forgotten. Measured on one thread: 15 to 30 MB/s of new text, 40 of words that are known;
    SentencePiece alone 3.5.
    """

    def __init__(
        self,
        pieces: Iterable[bytes],
        encode: Callable[[list[bytes]], Sequence[TokenArray]],
        dtype: type[np.uint16] | type[np.uint32],
    ) -> None:
        """`pieces`: the texts of all pieces that text is made of. `encode`: texts → ids, by merging bytes to those."""
        together = np.frombuffer(b"\xff".join(pieces), np.uint8)  # 0xff is in no UTF-8
        joined = np.zeros((256, 256), np.bool_)
        joined[together[:-1], together[1:]] = True
        joined[:, 0x80:0xC0] = True  # inside a character
        self._apart = ~joined.T.ravel()  # by a pair of bytes as a little-endian number
        self._encode = encode
        self._dtype = dtype
        self._low, self._high = np.empty((2, _SLOTS), np.uint64)
        self._numbers = np.zeros(_SLOTS, np.int64)  # of the word in each slot
        self._starts, self._counts = np.empty((2, _MAX_WORDS + _CHUNK), np.int64)  # of each word's ids
        self._ids: TokenArray = np.empty(_CHUNK, dtype)
        self._forget()

    def _forget(self) -> None:
        # A key is the bytes of a word, filled up with 0xff: an empty slot holds the key of the empty word.
        self._low.fill(2**64 - 1)
        self._high.fill(2**64 - 1)
        self._known: dict[bytes, int] = {}
        self._num_words = self._num_ids = 0

    def encode_batch(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """The ids of each text (UTF-8)."""
        content = b"".join(texts)
        if not content:
            return [np.empty(0, self._dtype) for _ in texts]
        ends = np.cumsum([len(text) for text in texts])
        starts = self._cut(content, ends)
        lengths = np.diff(starts, append=len(content))
        content += bytes(_WIDTH)  # so that a key can be read at every byte
        found: list[TokenArray] = []
        counts = np.zeros(len(starts) + 1, np.int64)
        for first in range(0, len(starts), _CHUNK):
            chunk = slice(first, first + _CHUNK)
            numbers = self._look_up(content, starts[chunk], lengths[chunk])
            counts[1:][chunk] = self._counts[numbers]
            found.append(self._ids[_ranges(self._starts[numbers], self._counts[numbers])])
        ids = np.concatenate(found)
        stops = counts.cumsum()[np.searchsorted(starts, ends)].tolist()
        return [ids[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]

    def _cut(self, content: bytes, ends: _Positions) -> _Positions:
        """Where the words of `content` begin; no word goes beyond one of `ends`."""
        begins = np.empty(len(content), np.bool_)
        begins[0] = True
        pairs: NDArray[np.uint16] = np.ndarray(len(content) - 1, "<u2", content, strides=1)
        for start in range(0, len(pairs), _WINDOW):
            window = pairs[start : start + _WINDOW]
            begins[start + 1 : start + 1 + len(window)] = self._apart[window]
        begins[ends[ends < len(content)]] = True
        return np.flatnonzero(begins)

    def _look_up(self, content: bytes, starts: _Positions, lengths: _Positions) -> _Positions:
        """The numbers of words; those that are new are encoded."""
        if self._num_words > _MAX_WORDS or self._num_ids > _MAX_IDS:
            self._forget()
        low, high = _keys(content, starts, lengths)
        slots = _slots(low, high)
        numbers = self._numbers[slots]
        strange = np.flatnonzero((self._low[slots] != low) | (self._high[slots] != high) | (lengths > _WIDTH))
        if len(strange):
            stops = (starts + lengths)[strange].tolist()
            words = [content[start:stop] for start, stop in zip(starts[strange].tolist(), stops, strict=True)]
            numbers[strange] = self._recall(words)
            short = strange[lengths[strange] <= _WIDTH]
            slot = slots[short]  # where several words want one slot, the last gets it
            self._low[slot], self._high[slot], self._numbers[slot] = low[short], high[short], numbers[short]
        return numbers

    def _recall(self, words: list[bytes]) -> list[int]:
        """The numbers of words that are not found by slots."""
        new = list(dict.fromkeys(word for word in words if word not in self._known))
        if not new:
            return [self._known[word] for word in words]
        encoded = self._encode(new)
        first, last = self._num_words, self._num_words + len(new)
        self._known.update(zip(new, range(first, last), strict=True))
        counts = np.fromiter(map(len, encoded), np.int64, len(new))
        self._counts[first:last] = counts
        self._starts[first:last] = self._num_ids + counts.cumsum() - counts
        ids = np.concatenate(encoded)
        if self._num_ids + len(ids) > len(self._ids):
            self._ids = np.resize(self._ids, 2 * (self._num_ids + len(ids)))
        self._ids[self._num_ids : self._num_ids + len(ids)] = ids
        self._num_words, self._num_ids = last, self._num_ids + len(ids)
        return [self._known[word] for word in words]


def _keys(content: bytes, starts: _Positions, lengths: _Positions) -> tuple[_Keys, _Keys]:
    """The first and the second eight bytes of each word as numbers; bytes beyond its end are 0xff.

    Behind the last word, `content` has _WIDTH bytes more.
    """
    eight_bytes: _Keys = np.ndarray(len(content) - 7, "<u8", content, strides=1)  # at every byte
    beyond = np.array([2**64 - 2 ** (8 * length) for length in range(8)] + [0], np.uint64)
    low = eight_bytes[starts] | beyond[np.minimum(lengths, 8)]
    high = eight_bytes[starts + 8] | beyond[np.clip(lengths - 8, 0, 8)]
    return low, high


def _slots(low: _Keys, high: _Keys) -> _Positions:
    """A slot for each key, by multiplying and folding (the finalizer of SplitMix64, Steele et al. 2014)."""
    mixed = low * np.uint64(0x9E3779B97F4A7C15) ^ high * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(65 - _SLOTS.bit_length())).astype(np.int64)


def _ranges(starts: _Positions, counts: NDArray[np.int64]) -> _Positions:
    """The positions start, start + 1, … of each of `starts`, so many of each as `counts` says."""
    ends = counts.cumsum()
    positions: _Positions = np.repeat(starts - (ends - counts), counts)
    positions += np.arange(len(positions))
    return positions
