"""Tokenizers as the files that `transformers.AutoTokenizer` opens, with the same ids and the same decoded text.

Owns what is in those files. The library's equal of a SentencePiece model is made in `sentencepiece_conversion`.
"""

from __future__ import annotations

import json
from typing import Any

from lmtrain.data.tokenizer.elementary import ByteTokenizer, CharTokenizer
from lmtrain.data.tokenizer.huggingface import END_KEY, HuggingFaceTokenizer
from lmtrain.data.tokenizer.interface import ASSISTANT, PAD, SYSTEM, TOOL, TURN_END, USER, Tokenizer
from lmtrain.data.tokenizer.sentencepiece_conversion import UNKNOWN, converted, inexpressible
from lmtrain.data.tokenizer.sentencepiece_model import SentencePieceTokenizer
from lmtrain.errors import UsageError

_ROLES = (SYSTEM, USER, ASSISTANT, TOOL)
_END = "<|endoftext|>"  # of tokenizers whose end token has no name


def huggingface_files(tokenizer: Tokenizer, *, model_max_length: int) -> dict[str, bytes]:
    """The files of a tokenizer by their names, for transformers 4.45 and later. UsageError for what they cannot hold.

    Every id is the one it was, the vocabulary is as large, and nothing is put before or after a text. A character that
    the tokenizer does not know is an error there too. `pad_token` is the padding token, or the end token if there is
    none. `tokenizer.model` is for other tools: transformers reads tokenizer.json.

    A text that holds the name of a special token, such as "<|user|>", is read as that token, as is usual there and as
    chat templates need; `tokenizer(text, split_special_tokens=True)` spells it out as ours do (but not where a given
    tokenizer.json has names as pieces, as unigram models do). `decode(ids, skip_special_tokens=True)` is ours, but for
    bytes of a SentencePiece model that are not UTF-8, which may be generated: all that stand together become U+FFFD,
    whole characters too.

    A tokenizer with the tokens of roles gets a chat template, which writes conversations as training reads them, but
    for the end token that follows whole ones.
    """
    files: dict[str, bytes] = {}
    match tokenizer:
        case SentencePieceTokenizer():
            end, library = tokenizer.proto.pieces[tokenizer.end_id].piece, _of_sentencepiece(tokenizer)
            files["tokenizer.model"] = tokenizer.serialize()
        case HuggingFaceTokenizer():
            end, library = tokenizer.end_token, _of_huggingface(tokenizer)
        case CharTokenizer() | ByteTokenizer():
            end, library = _END, _of_elementary(tokenizer)
        case _:
            raise _refusal(tokenizer, "it knows only ids, and no text")
    settings = _settings(tokenizer, end, model_max_length)
    files["tokenizer.json"] = json.dumps(library, indent=1, ensure_ascii=False).encode()
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    return files


def _refusal(tokenizer: Tokenizer, why: str) -> UsageError:
    return UsageError(
        f"the tokenizer ({tokenizer.name}) cannot be written for Hugging Face with the same ids: {why}; "
        "train a model to be exported with another, such as tokenizer=sentencepiece_bpe"
    )


def _settings(tokenizer: Tokenizer, end: str, model_max_length: int) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "eos_token": end,
        "pad_token": PAD if PAD in tokenizer.special else end,
        "additional_special_tokens": [name for name in tokenizer.special if name != PAD],
        "clean_up_tokenization_spaces": False,
    }
    if _has_roles(tokenizer):
        settings["chat_template"] = _chat_template()
    return settings


def _has_roles(tokenizer: Tokenizer) -> bool:
    return {*_ROLES, TURN_END} <= tokenizer.special.keys()


def _chat_template() -> str:
    """What `data.encoding` makes of a conversation, in Jinja."""
    roles = [token.removeprefix("<|").removesuffix("|>") for token in _ROLES]
    return (
        "{% for message in messages %}"
        f"{{% if message['role'] not in {roles} %}}"
        f"{{{{ raise_exception('a role is one of {', '.join(roles)}; got ' ~ message['role']) }}}}"
        "{% endif %}"
        f"{{{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '{TURN_END}' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
    )


# ------------------------------------------------------------------------- contents of tokenizer.json


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    if what := inexpressible(tokenizer.proto):
        raise _refusal(tokenizer, f"that library cannot do {what} as SentencePiece does")
    values: dict[str, Any] = json.loads(converted(tokenizer.proto).to_str())
    if values["model"]["type"] == "Unigram" and not values["model"]["byte_fallback"]:
        values["model"]["unk_id"] = None  # so that an unknown character is an error
    return values


def _of_elementary(tokenizer: CharTokenizer | ByteTokenizer) -> dict[str, Any]:
    """Byte-pair encoding that merges nothing."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    characters = tokenizer.characters if isinstance(tokenizer, CharTokenizer) else _characters_of_bytes()
    names = (_END, *tokenizer.special)
    vocabulary = {text: number for number, text in enumerate((*characters, *names))}
    library = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    library.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    if isinstance(tokenizer, CharTokenizer):
        library.decoder = decoders.Fuse()
    else:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
    values: dict[str, Any] = json.loads(library.to_str())
    return values


def _characters_of_bytes() -> list[str]:
    """What `ByteLevel` writes each byte as: as in Latin-1 if that can be seen, else by one from U+0100 on (GPT-2)."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(0x100)]


def _of_huggingface(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """Its own content, which adds no tokens to a text."""
    from tokenizers import Tokenizer

    values: dict[str, Any] = json.loads(tokenizer.serialize())
    values.pop(END_KEY, None)
    if Tokenizer.from_str(json.dumps(values)).num_special_tokens_to_add(False):
        values["post_processor"] = None
    if _has_roles(tokenizer):
        _treat_messages_as_texts(tokenizer, values)
    return values


def _treat_messages_as_texts(tokenizer: HuggingFaceTokenizer, values: dict[str, Any]) -> None:
    """What is done to the first part of a text only must be done behind every special token: each message is a text."""
    step = values["pre_tokenizer"]
    if '"first"' not in json.dumps(step):
        return
    if step["type"] != "Metaspace" or not all(token["special"] for token in values["added_tokens"]):
        raise _refusal(tokenizer, "it puts a space before texts (prepend_scheme=first), and would not before messages")
    step["prepend_scheme"] = "always"
