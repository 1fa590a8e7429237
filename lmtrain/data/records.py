"""What a source yields, one item a document, before it is tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Fragment:
    """A stretch of a document too large to be held whole; its fragments follow each other, cut after line ends."""

    text: str
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and what it becomes."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Message:
    """What one side of a conversation said."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, at least one of them of the assistant."""

    messages: tuple[Message, ...]


TokenIds = NDArray[np.integer[Any]]
"""A document that was tokenised elsewhere."""

Record = str | Fragment | Pair | Conversation | TokenIds
"""A whole text is a plain str: there may be many millions."""
