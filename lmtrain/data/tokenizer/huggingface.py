"""Tokenizers of the Hugging Face `tokenizers` library: text ↔ ids with one, and how a given one is taken over."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lmtrain.data.documents import TokenArray
from lmtrain.data.tokenizer.interface import SPECIAL, Tokenizer, token_dtype, utf8
from lmtrain.errors import DataError

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "[SEP]", "<eos>", "<|im_end|>")
"""Usual names of the token that ends a document, the first that a vocabulary has being it."""

END_KEY = "end_token"
"""Beside the library's own keys, if it is not a usual one."""


class HuggingFaceTokenizer(Tokenizer):
    """The content of a tokenizer.json, in which the end token and the special ones are marked as special.

    Nothing is added before or after a text, whatever the file says. Raises DataError if it is damaged.
    """

    name = "huggingface"

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._library, end_token = _read(content)
        marked = self._library.get_added_tokens_decoder().items()
        ids = {token.content: number for number, token in marked if token.special}
        self.vocab_size = max(self._library.get_vocab().values()) + 1
        self.end_id = ids[end_token]
        self.end_token: str = end_token
        self.special = {name: ids[name] for name in SPECIAL if name in ids}
        self._reserved = {end_token: self.end_id, **self.special}
        self._is_reserved = np.zeros(self.vocab_size, np.bool_)
        self._is_reserved[list(self._reserved.values())] = True
        self._library.encode_special_tokens = True  # a text that holds the name of a token is spelt out

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        for text in texts:
            utf8(text)
        arrays = encode_with(self._library, texts, token_dtype(self.vocab_size))
        return [
            self._spell_out(text, ids) if self._is_reserved[ids].any() else ids
            for text, ids in zip(texts, arrays, strict=True)
        ]

    def _spell_out(self, text: str, ids: TokenArray) -> TokenArray:
        """Encode a text so that no name in it becomes its token, which some kinds of models do."""
        names = [name for name, token in self._reserved.items() if token in ids]
        found = {match.start() + 1 for name in names for match in re.finditer(re.escape(name), text)}
        cuts = sorted(found - {len(text)})
        if not cuts:
            raise DataError(
                f"the text {text[:80]!r} holds {names[0]!r}, which the tokenizer cannot spell out; leave it out"
            )
        return np.concatenate([self.encode(text[start:stop]) for start, stop in pairwise([0, *cuts, len(text)])])

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._library.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def serialize(self) -> bytes:
        return self._content


def encode_with(library: Any, texts: Sequence[str], dtype: type[np.uint16] | type[np.uint32]) -> list[TokenArray]:
    """The ids that the library's tokenizer gives each text, with nothing added."""
    # One thread: processes share the work, and threads would complain about being forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoded = library.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(one.ids, dtype) for one in encoded]


def adopt_huggingface(content: bytes, end_token: str | None, special: Sequence[str]) -> HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json made elsewhere, with `special` tokens; `end_token` None: a usual one.

    Raises DataError if the file is damaged, has no end token, or its ids leave no room.
    """
    library, found = _read(content, end_token)
    added = [name for name in special if library.token_to_id(name) is None]
    library.no_truncation()
    library.no_padding()
    library.add_special_tokens([found, *special])
    ids = library.get_vocab()
    if len(set(ids.values())) < len(ids):
        raise DataError(f"its ids have gaps, so {added[0]} cannot be added")
    written: dict[str, Any] = json.loads(library.to_str())
    if found != _usual_end(library):
        written[END_KEY] = found
    return HuggingFaceTokenizer(json.dumps(written, ensure_ascii=False).encode())


def _read(content: bytes, end_token: str | None = None) -> tuple[Any, str]:
    """The library's tokenizer and its end token."""
    from tokenizers import Tokenizer as Library

    try:
        text = content.decode()
        if f'"{END_KEY}"' in text:
            values = json.loads(text)
            end_token = values.pop(END_KEY, end_token)
            text = json.dumps(values)
        library = Library.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"not a tokenizer.json of the tokenizers library, or damaged ({error})") from error
    end_token = end_token or _usual_end(library)
    if end_token is None:
        names = " ".join(END_TOKENS)
        raise DataError(f"it has none of the usual end tokens ({names}); name one by tokenizer.end_token")
    if library.token_to_id(end_token) is None:
        raise DataError(f"it has no token {end_token!r} (tokenizer.end_token)")
    return library, end_token


def _usual_end(library: Any) -> str | None:
    return next((name for name in END_TOKENS if library.token_to_id(name) is not None), None)
