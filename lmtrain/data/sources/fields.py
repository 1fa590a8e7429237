"""Rows of JSON, CSV or Parquet → records: which fields hold what, and which rows are bad."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lmtrain.data.records import ROLES, Conversation, Message, Pair, Record, Role
from lmtrain.data.sources.bad_records import BadRecord
from lmtrain.data.sources.blocks import is_unicode
from lmtrain.errors import DataError

Row = Mapping[str, Any]

Rows = Iterator[tuple[int, Row | BadRecord]]
"""Rows with their numbers, those of their first lines in files that have lines; and those that cannot be read."""

Columns = Callable[[Sequence[str]], Sequence[str]]
"""Which of the columns of a file to read. Raises DataError if those that are needed are not there."""

TEXT_FIELDS = ("text", "content", "message", "body", "output")
"""Where the text of a record is looked for."""

_ROLE_NAMES: dict[str, Role] = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Bound:
    """How the rows of one file are read."""

    columns: tuple[str, ...]  # what is needed of a row
    record: Callable[[Row], Record | None]  # None: empty, no document. Raises BadRecord


class Fields(Protocol):
    """What rows mean."""

    def bind(self, there: Sequence[str]) -> Bound:
        """Find the fields among those of a file. Raises BadRecord if they are not there."""


@dataclass(frozen=True)
class TextField:
    """A field that holds a text; None: the first of TEXT_FIELDS that is there."""

    name: str | None

    def bind(self, there: Sequence[str]) -> Bound:
        """Find the field."""
        name = self.name or next((name for name in TEXT_FIELDS if name in there), None)
        if name is None:
            message = f"has none of the fields {', '.join(TEXT_FIELDS)}; its fields are {listed(there)}"
            raise BadRecord("no field with a text", f"{message}: name one by data.field=NAME")
        _require_field(name, there)

        def record(row: Row) -> str | None:
            text = row.get(name)
            # Of the checks, those that nearly every row passes come first and in place.
            return (text if type(text) is str and text.isascii() else _text(row, name)) or None

        return Bound((name,), record)


@dataclass(frozen=True)
class ChatField:
    """A field that holds a list of messages."""

    name: str

    def bind(self, there: Sequence[str]) -> Bound:
        """Find the field, which many files call `conversations`."""
        name = "conversations" if self.name == "messages" and self.name not in there else self.name
        if name not in there:
            _require_field(self.name, there)
        return Bound((name,), lambda row: _conversation(_value(row, name), name))


@dataclass(frozen=True)
class PairFields:
    """Two fields, or templates such as "{context} {question}"."""

    source: str
    target: str

    def check(self) -> None:
        """Raise DataError for what is no template."""
        for setting, side in (("data.source", self.source), ("data.target", self.target)):
            try:
                names = _names(side)
            except ValueError as error:
                raise DataError(f"{setting}={side!r} is no template: {error}") from error
            if "" in names or not names:
                raise DataError(f"{setting}={side!r} is no template: name fields in braces, such as {{question}}")

    def bind(self, there: Sequence[str]) -> Bound:
        """Find the fields."""
        columns = tuple(dict.fromkeys(_names(self.source) + _names(self.target)))
        for name in columns:
            _require_field(name, there)
        return Bound(columns, self._pair)

    def _pair(self, row: Row) -> Pair:
        return pair_of(_side(row, self.source), _side(row, self.target))


def pair_of(source: str, target: str) -> Pair:
    """A pair of two texts. Raises BadRecord if one of them is empty."""
    for side, text in (("source", source), ("target", target)):
        if not text or text.isspace():
            raise BadRecord(f"empty {side}", f"has an empty {side}")
    return Pair(source, target)


def listed(names: Sequence[str]) -> str:
    """A few names, none of them long."""
    short = [name if len(name) <= 40 else f"{name[:40]}…" for name in map(str, names[:20])]
    return ", ".join(short + ["…"] * (len(names) > len(short))) or "none"


def _require_field(name: str, there: Sequence[str]) -> None:
    if name not in there:
        raise BadRecord("missing field", f"has no field {name!r}; its fields are {listed(there)}")


def _value(row: Row, name: str) -> Any:
    if name not in row:
        _require_field(name, list(row))
    return row[name]


def _text(row: Row, name: str) -> str:
    return _checked(_value(row, name), name)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        what = "null" if value is None else type(value).__name__
        raise BadRecord("not a text", f"has no text in its field {name!r}, but {what}")
    if not is_unicode(value):
        raise BadRecord("not UTF-8", f"has bytes that are not UTF-8, or half a surrogate pair, in its field {name!r}")
    return value


def _conversation(messages: Any, field: str) -> Conversation:
    if not isinstance(messages, list):
        raise BadRecord("not a list of messages", f"has no list of messages in its field {field!r}")
    conversation = Conversation(tuple(map(_message, messages)))
    if not any(message.role == "assistant" for message in conversation.messages):
        raise BadRecord("no assistant turn", "has no assistant turn: there is nothing to learn to say")
    return conversation


def _message(message: Any) -> Message:
    if not isinstance(message, dict):
        raise BadRecord("not a list of messages", "has a message that is no object with role and content")
    name = message.get("from") if message.get("role") is None else message["role"]
    content = message.get("value") if message.get("content") is None else message["content"]
    role = _ROLE_NAMES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_ROLE_NAMES)
        raise BadRecord("unknown role", f"has a message of the unknown role {listed([str(name)])!r}; known are {known}")
    return Message(role, _checked(content, "content"))


# ------------------------------------------------------------------------------------------ templates


class _Template(string.Formatter):
    """Fills in texts and numbers only: what a list or null looks like in Python is never meant."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            what = "null" if value is None else type(value).__name__
            raise BadRecord("not a text", f"has no text where a template needs one, but {what}")
        return str(super().format_field(value, format_spec))


_TEMPLATE = _Template()


def _names(side: str) -> list[str]:
    """The fields that a name or a template needs. Raises ValueError for a broken template."""
    if "{" not in side:
        return [side]
    names = [name for _, name, _, _ in _TEMPLATE.parse(side) if name is not None]
    return [name.split(".")[0].split("[")[0] for name in names]


def _side(row: Row, side: str) -> str:
    if "{" not in side:
        return _text(row, side)
    try:
        text = _TEMPLATE.vformat(side, (), row)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        for name in _names(side):
            _value(row, name)
        raise BadRecord("no fit for a template", f"does not fit the template {side!r}: {error}") from error
    return _checked(text, side)
