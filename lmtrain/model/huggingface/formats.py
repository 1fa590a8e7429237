"""What a format of Hugging Face says: the settings it has room for, and the names under which it keeps each weight.

Moves no weights. Ours and theirs agree in the rest: pre-normalisation, one residual stream, rotary channels i and
i + C/2 turned together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmtrain.config.schema import DecoderConfig
from lmtrain.errors import CheckpointError

NO_ROOM: dict[str, tuple[object, ...]] = {"qk_norm": (False,), "logit_softcap": (None,), "sliding_window": (None,)}
"""Settings that no format here has room for, each with the value that says it is not in use."""


@dataclass(frozen=True)
class Place:
    """Where a format keeps a weight of ours: one tensor, or several that hold its rows one after the other."""

    names: tuple[str, ...]
    rows: tuple[int, ...] | None = None  # of ours in each of several
    transposed: bool = False  # matrices stand as [in, out]

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Those of the tensors that hold a weight of ours of this shape."""
        rows = (shape[0],) if self.rows is None else self.rows
        whole = [(count, *shape[1:]) for count in rows]
        return [part[::-1] for part in whole] if self.transposed else whole


@dataclass(frozen=True, kw_only=True)
class Described:
    """The model that a `config.json` describes."""

    config: DecoderConfig
    vocab_size: int
    seq_len: int  # the longest context, in tokens


class Format(ABC):
    """A format: what it can hold, and both ways between its words and ours."""

    name: ClassVar[str]
    model_type: ClassVar[str]  # as `config.json` has it
    architecture: ClassVar[str]  # class in transformers
    prefix: ClassVar[str]  # of the names, but in folders saved without the output matrix
    always_biased: ClassVar[bool]  # whether maps and norms have a bias in any case
    unused: ClassVar[tuple[str, ...]]  # ends of names that some folders have and no model needs

    @abstractmethod
    def room(self, config: DecoderConfig) -> Mapping[str, tuple[object, ...]]:
        """The values that settings may have, the first the one to take; settings that are not named are free."""

    @abstractmethod
    def describe(self, described: Described) -> dict[str, Any]:
        """The architecture in the words of the format's `config.json`."""

    @abstractmethod
    def parse(self, values: Mapping[str, Any]) -> Described:
        """The architecture that a `config.json` of this format describes, with the defaults of transformers.

        Raises CheckpointError for what a decoder of ours is not, KeyError, TypeError or ValueError if it is damaged.
        """

    @abstractmethod
    def places(self, config: DecoderConfig) -> dict[str, Place]:
        """Where each weight is, by our names; biases are among them whether there are any or not."""

    def obstacles(self, config: DecoderConfig) -> dict[str, object]:
        """Settings that this format has no room for, each with the value to take instead."""
        room = {**self.room(config), **NO_ROOM}
        return {name: values[0] for name, values in room.items() if getattr(config, name) not in values}


def biased(places: Mapping[str, Place]) -> dict[str, Place]:
    """Those of weights, and for each that of its bias beside it."""
    both = dict(places)
    for ours, place in places.items():
        names = tuple(name.removesuffix("weight") + "bias" for name in place.names)
        both[ours.removesuffix("weight") + "bias"] = Place(names, place.rows)
    return both


def require_known(values: Mapping[str, Any], known: Mapping[str, Sequence[object] | Collection[object]]) -> None:
    """Raise CheckpointError that names each value which is not among those known; None counts as not given."""
    strange = [f"{key}={values[key]}" for key in known if values.get(key) is not None and values[key] not in known[key]]
    if strange:
        raise CheckpointError(f"its config.json has {', '.join(strange)}, which no model here is made with")
