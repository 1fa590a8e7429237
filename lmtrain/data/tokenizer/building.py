"""From settings, or from a file, to a tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from lmtrain.config.schema import (
    ByteConfig,
    CharConfig,
    HuggingFaceConfig,
    IdsConfig,
    SavedTokenizerConfig,
    SentencePieceConfig,
    SentencePieceModelConfig,
    TokenizerConfig,
)
from lmtrain.data.tokenizer.elementary import ByteTokenizer, CharTokenizer, IdsTokenizer, load_elementary
from lmtrain.data.tokenizer.huggingface import HuggingFaceTokenizer, adopt_huggingface
from lmtrain.data.tokenizer.interface import SPECIAL, Tokenizer
from lmtrain.data.tokenizer.sentencepiece_conversion import SPACE_MARK
from lmtrain.data.tokenizer.sentencepiece_model import SentencePieceTokenizer, adopt_sentencepiece
from lmtrain.data.tokenizer.sentencepiece_training import train_sentencepiece
from lmtrain.errors import DataError
from lmtrain.run_dir import OWN_TOKENIZER, RunDir

log = logging.getLogger(__name__)

# What a tokenizer made elsewhere may change, and a text that shows it.
_PROBES = {
    "spaces at the start": " a",
    "spaces at the end": "a ",
    "runs of spaces": "a   b",
    "line ends": "a\nb\r\n\nc\n",
    "tabs": "a\tb",
    "spaces beside punctuation": "(a,b) 's",
    "capital letters": "aBC",
    "accents": "áñe\u0301",
    "forms of a character": "ﬁ①ａ",
    "rare characters": "日👩\u200d👧𝔘\u0378",
    f"the character {SPACE_MARK}": f"a{SPACE_MARK}b",
}


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote. Raises DataError if the file is missing or damaged."""
    content = _read(path)
    try:
        return load_tokenizer_bytes(content)
    except DataError as error:
        raise DataError(f"{path} is damaged, or no tokenizer: {error}") from error


def load_tokenizer_bytes(content: bytes) -> Tokenizer:
    """The tokenizer that `Tokenizer.serialize` gave. Raises DataError if it is damaged."""
    if not content.startswith(b"{"):
        return SentencePieceTokenizer(content)
    return load_elementary(content) if content.startswith(b'{"tokenizer"') else HuggingFaceTokenizer(content)


def tokenizer_file(config: TokenizerConfig) -> Path | None:
    """The file a given tokenizer is read from; None for others. Raises DataError if there is none."""
    if not isinstance(config, SentencePieceModelConfig | HuggingFaceConfig | SavedTokenizerConfig):
        return None
    path = Path(config.path).expanduser()
    if path.is_dir() and not isinstance(config, SentencePieceModelConfig):
        path = path / "tokenizer.json" if isinstance(config, HuggingFaceConfig) else _saved_in(path)
    if not path.is_file():
        raise DataError(f"tokenizer.path={config.path}: there is no file {path}")
    return path


def train_tokenizer(
    config: TokenizerConfig, lines: Sequence[str], characters: str, special: Sequence[str]
) -> Tokenizer:
    """Make the tokenizer that `config` names; the same lines always give the same one.

    `lines` and `characters` are those of a `TextSample` (`sample_for`), `special` the names of the special tokens that
    the data need. A given tokenizer is read, and one warning tells what it does not give back. Raises DataError if the
    text does not allow the vocabulary asked for, or for a file that cannot be used.
    """
    assert set(special) <= set(SPECIAL)
    names = [name for name in SPECIAL if config.special_tokens == "all" or name in special]
    match config:
        case SentencePieceConfig():
            return train_sentencepiece(config, lines, characters, names)
        case SentencePieceModelConfig():
            return _given(config, lambda content: adopt_sentencepiece(content, names))
        case HuggingFaceConfig():
            return _given(config, lambda content: adopt_huggingface(content, config.end_token, names))
        case SavedTokenizerConfig():
            return _saved(config, names)
        case CharConfig():
            if not characters:
                raise DataError("there is no text to make a char tokenizer from; use tokenizer=byte")
            return CharTokenizer(characters, names)
        case ByteConfig():
            return ByteTokenizer(names)
        case IdsConfig():
            return IdsTokenizer(config.vocab_size, config.end_id, names)
    raise TypeError(f"no tokenizer for {type(config).__name__}")


def _given(config: SentencePieceModelConfig | HuggingFaceConfig, adopt: Callable[[bytes], Tokenizer]) -> Tokenizer:
    path = tokenizer_file(config)
    assert path is not None
    try:
        tokenizer = adopt(_read(path))
    except DataError as error:
        raise DataError(f"tokenizer.path={config.path}: {error}") from error
    if lost := [what for what, text in _PROBES.items() if _loses(tokenizer, text)]:
        log.warning("the tokenizer %s does not give every text back; it changes %s", path, ", ".join(lost))
    return tokenizer


def _saved(config: SavedTokenizerConfig, special: Sequence[str]) -> Tokenizer:
    """Taken as it is: models that were trained with it know no other ids."""
    path = tokenizer_file(config)
    assert path is not None
    tokenizer = load_tokenizer(path)
    if missing := [name for name in special if name not in tokenizer.special]:
        raise DataError(
            f"tokenizer.path={config.path}: it has no token {missing[0]}, which conversations need, and gets none: "
            "train one with tokenizer.special_tokens=all"
        )
    return tokenizer


def _saved_in(folder: Path) -> Path:
    """The file in a run folder, or in what one was exported to."""
    exported = folder / OWN_TOKENIZER
    return exported if exported.is_file() else RunDir(folder).tokenizer


def _loses(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return tokenizer.decode(tokenizer.encode(text)) != text
    except DataError:
        return False  # such text is refused


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from error
