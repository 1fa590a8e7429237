"""SentencePiece models as tokenizers of the Hugging Face `tokenizers` library, of the same ids; or why not.

Pieces are written with the spaces they stand for. So a text needs no mark for spaces, and U+2581 in it is spelt in
bytes like any other character that has no piece. Reads and writes no files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from math import ceil
from typing import Any

SPACE_MARK = "\u2581"
"""What SentencePiece writes a space as inside; that character itself is spelt by its bytes to survive."""

UNKNOWN = "(a character that the tokenizer does not know)"
"""In no vocabulary: as the token for unknown characters, it makes them an error of the library, which names it."""

_SYMBOL_SCORE = -0.1  # what SentencePiece gives a user-defined symbol of a unigram model, whatever the file says


def inexpressible(proto: Any) -> str | None:
    """What the library cannot do as this model (a protocol buffer) does; None: nothing."""
    return next(_obstacles(proto), None)


def _obstacles(proto: Any) -> Iterator[str]:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        yield f"models of type {trainer.ModelType.Name(trainer.model_type).lower()}"
    if normalizer.precompiled_charsmap or proto.denormalizer_spec.precompiled_charsmap:
        # The library has `Precompiled`. But that replaces graphemes by the first rule that fits, SentencePiece the
        # longest prefix of the text: "\r\n", halfwidth "ﾊﾞ" and "e" with two accents become other texts.
        yield f"the normalisation {normalizer.name or 'of characters'}"
    if normalizer.remove_extra_whitespaces:
        yield "the removal of spaces (remove_extra_whitespaces)"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        yield "the treatment of spaces (treat_whitespace_as_suffix, escape_whitespaces)"
    pieces = _Pieces(proto)
    if bare := [piece.piece for piece in proto.pieces if " " in piece.piece]:
        yield f"a space in a piece that is not written as U+2581 ({bare[0]!r})"
    if pieces.unused:
        yield f"unused pieces ({pieces.unused[0]!r})"
    if len(set(pieces.texts)) < len(pieces.texts):
        yield "two pieces of one text"
    if strange := set(chain.from_iterable(pieces.normal)) - pieces.normal.keys():
        yield f"the character {min(strange)!r}, which is in pieces and has none of its own"
    if short := [name for name in pieces.reserved if len(name) < 2]:
        yield f"a special token of one character ({short[0]!r})"
    if trainer.model_type == trainer.UNIGRAM and (hidden := _hidden(pieces)):
        yield f"symbols that hold parts of {hidden!r}"
    if trainer.model_type == trainer.BPE:
        if normalizer.add_dummy_prefix and pieces.long_symbols:
            yield f"the symbol {pieces.long_symbols[0]!r} behind a space that is put before every text"
        scores = Counter(pieces.normal[text] for text in {left + right for left, right in _merges(pieces)})
        if scores and (equal := scores.most_common(1)[0])[1] > 1:
            yield f"pieces of the same rank (score {equal[0]:g})"


def converted(proto: Any) -> Any:
    """The library's tokenizer of a model that is expressible: of the same ids and texts.

    Its special tokens are the control symbols. Ids that are not UTF-8 together are all decoded to U+FFFD, also those
    of a whole character beside them. Where two ways to split a text are equally likely in a unigram model, the library
    takes the one whose last piece is longer; SentencePiece lets rounding decide, so that it hangs on all text before.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    assert inexpressible(proto) is None
    pieces, normalizer, trainer = _Pieces(proto), proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type == trainer.BPE:
        vocabulary = {text: number for number, text in enumerate(pieces.texts)}
        unknown = None if pieces.has_bytes else UNKNOWN
        library = Tokenizer(
            models.BPE(vocabulary, list(_merges(pieces)), byte_fallback=pieces.has_bytes, unk_token=unknown)
        )
        # "normalized": searched for apart from special tokens, whose names may hold a symbol.
        library.add_tokens([AddedToken(symbol, normalized=True) for symbol in pieces.long_symbols])
    else:
        library = Tokenizer(
            models.Unigram(_scored(pieces), pieces.texts.index(pieces.unknown), byte_fallback=pieces.has_bytes)
        )
        if cuts := _cuts(pieces):
            pattern = "|".join(f"{re.escape(left)}(?={re.escape(right)})" for left, right in cuts)
            library.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "merged_with_previous")
    library.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in pieces.control])
    steps: list[Any] = [
        decoders.Replace(Regex(rf"\A{re.escape(pieces.unknown)}\z"), trainer.unk_surface),
        *([decoders.ByteFallback()] if pieces.has_bytes else []),
        decoders.Fuse(),
    ]
    if normalizer.add_dummy_prefix:
        library.normalizer = normalizers.Replace(Regex(rf"\A(?=[^{SPACE_MARK}])"), " ")
        steps.append(decoders.Strip(" ", 1, 0))
    library.decoder = decoders.Sequence(steps)
    return library


class _Pieces:
    """The pieces of a model by their kinds, with spaces for marks of spaces."""

    def __init__(self, proto: Any) -> None:
        kind = proto.SentencePiece
        self.texts: list[str] = []  # by id
        self.normal: dict[str, float] = {}  # with their scores
        self.symbols: list[str] = []
        self.control: list[str] = []
        self.unused: list[str] = []
        self.reserved: list[str] = []  # names that text is never made of
        self.unknown = ""
        self.has_bytes = False
        for piece in proto.pieces:
            of_text = piece.type in (kind.NORMAL, kind.USER_DEFINED, kind.UNUSED)
            text = piece.piece.replace(SPACE_MARK, " ") if of_text else piece.piece
            self.texts.append(text)
            match piece.type:
                case kind.NORMAL:
                    self.normal[text] = piece.score
                case kind.USER_DEFINED:
                    self.symbols.append(text)
                case kind.UNUSED:
                    self.unused.append(text)
                case kind.CONTROL:
                    self.control.append(text)
                case kind.UNKNOWN:
                    self.unknown = text
                case kind.BYTE:
                    self.has_bytes = True
            if not of_text:
                self.reserved.append(text)

    @property
    def long_symbols(self) -> list[str]:
        """Those that must be searched for: a single character is a piece that nothing is merged with."""
        return [symbol for symbol in self.symbols if len(symbol) > 1]


# --------------------------------------------------------------------------------- byte-pair encoding


def _merges(pieces: _Pieces) -> Iterator[tuple[str, str]]:
    """Every pair that makes a piece, by its rank.

    SentencePiece ranks what is made, the library what it is made of. One piece made in two ways at two places that
    share a part would show the difference; that does not happen where ranks differ (it was searched for in a million
    texts under random vocabularies).
    """
    for text in sorted(pieces.normal, key=lambda text: -pieces.normal[text]):
        for cut in range(1, len(text)):
            if text[:cut] in pieces.normal and text[cut:] in pieces.normal:
                yield text[:cut], text[cut:]


# --------------------------------------------------------------------------------------------- unigram


def _scored(pieces: _Pieces) -> list[tuple[str, float]]:
    """All pieces with scores, in steps of 2⁻¹².

    In these, sums of doubles are exact in whatever order they are made, and the library reads numbers from a file as
    they were written, which it does not with more digits. To the library names of special tokens are pieces: they cost
    more than their letters.
    """
    longest = max(map(len, pieces.reserved), default=0)
    never = -float((longest + 1) * ceil(1 + abs(min(pieces.normal.values(), default=0))))
    scores = pieces.normal | dict.fromkeys(pieces.symbols, _SYMBOL_SCORE)
    return [(text, round(scores.get(text, never) * 2**12) / 2**12) for text in pieces.texts]


def _cuts(pieces: _Pieces) -> list[tuple[str, str]]:
    """Letters side by side in names of special tokens and in no piece: text cut between them is split as before.

    So a name is not found in a text even where a letter of it has no piece, and costs as much as the name does.
    """
    joined = set(chain.from_iterable(map(pairwise, chain(pieces.normal, pieces.symbols))))
    first = (next((pair for pair in pairwise(name) if pair not in joined), None) for name in pieces.reserved)
    return list(dict.fromkeys(pair for pair in first if pair))


def _hidden(pieces: _Pieces) -> str | None:
    """The name of a special token with a letter that has no piece, but nowhere to cut it."""
    cuts, letters = set(_cuts(pieces)), {*pieces.normal, *pieces.symbols}
    return next((name for name in pieces.reserved if not cuts & set(pairwise(name)) and set(name) - letters), None)
