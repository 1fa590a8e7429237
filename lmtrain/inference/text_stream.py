"""Tokens that come one at a time → pieces of text that stay as they are, cut before a stop string.

Knows of the tokenizer only how it decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoding gives for bytes that are no character, or not yet."""

MAX_HALF = 3
"""Bytes that a character of UTF-8 can lack its last one of: each may be decoded as a REPLACEMENT of its own."""

CONTEXT = 8
"""Tokens decoded again together with new ones: some tokenizers write a token otherwise at the beginning of a text."""

MAX_WINDOW = 32
"""Tokens after which the window moves on, so that decoding does not take longer and longer."""


class TextStream:
    """The text of one row: `add` each token as it comes, then `finish`."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int], stops: Sequence[str] = ()):
        """`stops`: texts that end this one and are not part of it."""
        self.text = ""  # all that came out
        self.stopped = False  # by a stop string
        self._decode = decode
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string
        self._window: list[int] = []
        self._read = 0  # characters of the window's text that were taken from it
        self._move_window(prompt_ids)

    def add(self, token: int) -> str:
        """The text that can be shown now: without half a character, without what may be part of a stop string."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = _without_half(text)
        piece = self._release(text[self._read : whole], ended=False)
        self._read = max(self._read, whole)
        if len(self._window) > MAX_WINDOW:
            self._move_window(self._window)
        return piece

    def finish(self) -> str:
        """What was held back."""
        return self._release(self._decode(self._window)[self._read :], ended=True)

    def _move_window(self, ids: Sequence[int]) -> None:
        self._window = list(ids[-CONTEXT:])
        self._read = _without_half(self._decode(self._window))

    def _release(self, new: str, *, ended: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        cuts = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            text = text[: min(cuts)]
        elif not ended:
            shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[:shown], text[shown:]
        self.text += text
        return text


def _without_half(text: str) -> int:
    """Characters of a text before those at its end that may stand for the beginning of one character."""
    return len(text) - min(MAX_HALF, len(text) - len(text.rstrip(REPLACEMENT)))


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that `stop` begins with."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
