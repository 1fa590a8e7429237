"""What models in a store are called, and which words name a store. Reads and writes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lmtrain.config.schema import default_model_store
from lmtrain.config.schema.rules import require

MAX_LENGTH = 100
REGISTRY = "mlflow"
"""The word for the MLflow registry of this working folder and environment."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_ALIAS = re.compile(r"[A-Za-z0-9_-]+")
_RESERVED_ALIAS = re.compile(r"latest|v[0-9]+", re.IGNORECASE)  # by MLflow


@dataclass(frozen=True, kw_only=True)
class ModelId:
    """A model as users name it: by version, by alias (of a registry only), or neither: its newest version."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        return self.name + (f":{self.version}" if self.version else f"@{self.alias}" if self.alias else "")


def parse_id(text: str) -> ModelId:
    """`NAME`, `NAME:VERSION` or `NAME@ALIAS`. Raises ConfigError for what no model can be called."""
    name, mark, rest = re.fullmatch(r"([^:@]*)([:@]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    require_name(name)
    if mark == "@":
        require_alias(rest)
        return ModelId(name=name, alias=rest)
    require(
        not mark or is_version(rest),
        f"a model's version is a number from 1 up, as in {name}:1, got {_shown(rest)}",
    )
    return ModelId(name=name, version=int(rest) if mark else None)


def is_name(text: str) -> bool:
    """Whether a model can have this name, which is that of a folder."""
    return _NAME.fullmatch(text) is not None and ".." not in text and len(text) <= MAX_LENGTH


def is_version(text: str) -> bool:
    """Whether this is the number of a version."""
    return _VERSION.fullmatch(text) is not None


def require_name(name: str) -> None:
    """Raise ConfigError unless a model can have this name."""
    require(
        is_name(name),
        "a model's name is of letters, digits, '.', '_' and '-' (first a letter or a digit, no '..', at most "
        f"{MAX_LENGTH} characters), got {_shown(name)}",
    )


def require_alias(alias: str) -> None:
    """Raise ConfigError unless MLflow takes this alias."""
    require(
        _ALIAS.fullmatch(alias) is not None and len(alias) <= MAX_LENGTH and not _RESERVED_ALIAS.fullmatch(alias),
        f"an alias has letters, digits, '_' and '-', and is neither 'latest' nor like 'v1', got {_shown(alias)}",
    )


def store_word(word: str | None) -> str:
    """The word that names the store: that given, else the default."""
    return word or default_model_store()


def is_registry(word: str) -> bool:
    """Whether a word names an MLflow registry; else it names a folder."""
    return word == REGISTRY or "://" in word


def _shown(text: str) -> str:
    """With control characters by their escapes, and not longer than a line."""
    return repr(text if len(text) <= MAX_LENGTH else f"{text[:40]}…")
