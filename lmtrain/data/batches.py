"""What one optimizer step trains on: the batch, and what all ways to make batches have in common.

Owns the shape of a batch and how it is cut and moved. Which tokens it holds is decided in `packed`, `padded` and
`sequence_to_sequence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.data.documents import Documents

IGNORED = -100  # target of a position that does not count; the default of torch's cross entropy


@dataclass(frozen=True)
class Batch:
    """Next-token prediction: `targets[b, t]` follows `inputs[b, t]`, or is IGNORED.

    Rows that are shorter than the longest are filled up at their right with inputs 0 and targets IGNORED. Attention to
    the past never looks there, so it needs no mask.
    """

    inputs: Tensor  # (B, T) int64; of an encoder-decoder: the targets so far, the end token first
    targets: Tensor  # (B, T) int64, IGNORED where not counted
    num_targets: int  # targets that count; a part cut from a batch tells those of the whole, which sums are divided by
    rows_per_sequence: int = 1  # more while sequences still grow: a row is then a piece of one of full length
    documents: Tensor | None = None  # (B, T) int64, growing: tokens of a row see those with the same number only
    sources: Tensor | None = None  # (B, S) int64, what an encoder reads, filled up at the right
    source_mask: Tensor | None = None  # (B, S) bool, True where `sources` holds a token

    @property
    def num_sequences(self) -> int:
        """What `batch_size` and `micro_batch_size` count."""
        return len(self.inputs) // self.rows_per_sequence

    @property
    def context(self) -> dict[str, Tensor]:
        """What the model is called with beside the inputs: `model(batch.inputs, **batch.context)`."""
        named = {"documents_BT": self.documents, "sources_BS": self.sources, "source_mask_BS": self.source_mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def split(self, num_sequences: int) -> Iterator[Batch]:
        """Consecutive parts of at most so many sequences."""
        rows = num_sequences * self.rows_per_sequence
        for start in range(0, len(self.inputs), rows):
            yield self._map(lambda tensor, part=slice(start, start + rows): tensor[part])  # type: ignore[misc]

    def share(self, number: int, of: int) -> Batch:
        """The part of one among `of` processes, of as many sequences as that of each other.

        Where sequences are too few for that, their place is taken by the first one without its targets.
        """
        if of == 1:
            return self
        rows = -(-self.num_sequences // of) * self.rows_per_sequence
        own = slice(number * rows, (number + 1) * rows)
        missing = rows - len(self.inputs[own])
        part = self._map(lambda tensor: torch.cat([tensor[own], tensor[:1].expand(missing, *tensor.shape[1:])]))
        part.targets[rows - missing :] = IGNORED
        return part

    def to(self, device: torch.device) -> Batch:
        """The same on a device; from pinned memory without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, which a GPU reads by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Source:
    """Documents to make sequences of."""

    documents: Documents
    weight: float = 1.0  # share of the sequences, beside those of the other sources
    name: str = ""  # for messages, if there are several


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie: stretches of tokens, each of its inputs and the last target. All arrays (B,)."""

    sources: NDArray[np.int64]  # of which source
    starts: NDArray[np.int64]  # position of the first input in the source's tokens, below their number
    lengths: NDArray[np.int64]  # inputs; a stretch that reaches the end of the tokens goes on at their beginning

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, chosen: slice | NDArray[np.int64]) -> Rows:
        return Rows(self.sources[chosen], self.starts[chosen], self.lengths[chosen])

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """All rows of several, in their order."""
        return Rows(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Rows)))

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Source, start and length of every row."""
        return zip(self.sources.tolist(), self.starts.tolist(), self.lengths.tolist(), strict=True)


class TrainBatches(Protocol):
    """`batches[step]` for any step ≥ 0, as a function of (documents, seed, step) alone."""

    @property
    def epoch_size(self) -> int:
        """Sequences of an epoch."""
        ...

    @property
    def mean_targets(self) -> Fraction:
        """Targets of a sequence, in the mean over a run."""
        ...

    @property
    def largest(self) -> Batch:
        """A batch as large as any of the run, to find out what fits into memory."""
        ...

    @property
    def note(self) -> str:
        """What of the documents is never trained on, in a line; empty if nothing."""
        ...

    def __getitem__(self, step: int) -> Batch: ...

    def rows(self, step: int) -> Rows:
        """Where the rows of a step lie."""
        ...

    def sequences(self, step: int) -> range:
        """The numbers that are a step's share of the run's sequences."""
        ...

    def steps_for(self, *, sequences: int) -> int:
        """The smallest number of steps that hold so many sequences."""
        ...


class EvalBatches(Protocol):
    """The same batches every time, in the same order."""

    @property
    def note(self) -> str:
        """What of the documents is not evaluated, in a line; empty if nothing."""
        ...

    @property
    def num_sequences(self) -> int:
        """Of all batches."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def located(self) -> Iterator[tuple[Rows, Batch]]:
        """Every batch, with where its rows lie."""
        ...


def note_of_limit(number: int, of: int, what: str) -> str:
    """What to note where only the first `number` of so many are read; empty if all are."""
    return f"only the first {number:,} of {of:,} {what} are read, as trainer.eval_batches says" if number < of else ""


def joined_notes(*notes: str) -> str:
    """One line of those that are not empty."""
    return "; ".join(filter(None, notes))
