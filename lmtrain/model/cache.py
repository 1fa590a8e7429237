"""The keys and values of what a model has read, kept so that nothing is computed twice.

Not here: attention, which writes and reads them. In shapes B is rows, K key and value heads, T time, S the length of
sources, C the width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmtrain.model.attend import EVERYTHING, Visible


@dataclass(frozen=True)
class Memory:
    """What the layers of a decoder see of the rows' sources."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values, each [B, K, S, C]
    visible: Visible

    def rows(self, rows: Sequence[int]) -> Memory:
        """Of these rows, in this order; one may be there several times."""
        index = torch.tensor(rows, device=self.layers[0][0].device)
        mask_BTS = None if self.visible.mask is None else self.visible.mask[index]
        return Memory([(keys[index], values[index]) for keys, values in self.layers], Visible(mask=mask_BTS))


class KeyValueCache:
    """Rows of different lengths, each of up to `capacity` tokens, in memory that is set aside once.

    Only the key and value heads there are take room: a group of query heads shares one.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        head_shape: tuple[int, int],
        batch_size: int,
        capacity: int,
        like: Tensor,
        memory: Memory | None = None,
    ) -> None:
        """For heads of shape [K, C], on the device of `like`, in its number format."""
        num_heads, head_dim = head_shape
        shape = (batch_size, num_heads, capacity, head_dim)
        # Zeros: what a longer row makes a shorter one pass over has weight 0, and must not be NaN.
        self.layers = [LayerCache(self, like.new_zeros(shape), like.new_zeros(shape)) for _ in range(num_layers)]
        self.memory = memory
        self.capacity = capacity
        self.longest = 0
        self.start: int | Tensor = 0  # position of every row's next token: a number if all agree, else [B] int64
        self._lengths = [0] * batch_size
        self._places_T = torch.arange(capacity, device=like.device)

    def visible(self, window: int | None = None) -> Visible:
        """What each row's next token sees, itself included: all of the row, or so many tokens at its end."""
        if isinstance(self.start, int) and (window is None or self.start < window):
            return EVERYTHING
        places_T = self._places_T[: self.longest + 1]
        start_BT = self.start.unsqueeze(1) if isinstance(self.start, Tensor) else places_T.new_full((1, 1), self.start)
        mask_BT = places_T <= start_BT
        if window is not None:
            mask_BT = mask_BT & (places_T > start_BT - window)
        return Visible(mask=mask_BT.unsqueeze(1))

    def advance(self, num_tokens: int) -> None:
        """Every layer has appended so many tokens to each row."""
        self._lengths = [length + num_tokens for length in self._lengths]
        self.start = self.start + num_tokens
        self.longest += num_tokens

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first so many tokens of each row."""
        self._lengths = list(lengths)
        self.longest = max(lengths)
        all_agree = min(lengths) == self.longest
        self.start = self.longest if all_agree else torch.tensor(self._lengths, device=self._places_T.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these, which are numbered anew; one may be there several times."""
        index = torch.tensor(rows, device=self._places_T.device)
        for layer in self.layers:
            layer.keys_BKTC, layer.values_BKTC = layer.keys_BKTC[index], layer.values_BKTC[index]
        if self.memory is not None:
            self.memory = self.memory.rows(rows)
        self.truncate([self._lengths[row] for row in rows])

    def replace(self, rows: Sequence[int], other: KeyValueCache) -> None:
        """Let these rows hold what those of another cache hold, of the same sources."""
        index, end = torch.tensor(rows, device=self._places_T.device), other.longest
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            layer.keys_BKTC[index, :, :end] = theirs.keys_BKTC[:, :, :end]
            layer.values_BKTC[index, :, :end] = theirs.values_BKTC[:, :, :end]
        lengths = dict(enumerate(self._lengths)) | dict(zip(rows, other._lengths, strict=True))
        self.truncate(list(lengths.values()))


class LayerCache:
    """What one layer has computed."""

    def __init__(self, cache: KeyValueCache, keys_BKTC: Tensor, values_BKTC: Tensor) -> None:
        self.cache = cache
        self.keys_BKTC = keys_BKTC
        self.values_BKTC = values_BKTC

    def append(self, keys_BKTC: Tensor, values_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens and return those of all tokens: several to empty rows, else one."""
        start, length = self.cache.start, keys_BKTC.size(2)
        end = self.cache.longest + length
        assert length == 1 or self.cache.longest == 0, "a filled cache takes one token at a time"
        assert end <= self.cache.capacity, f"{end} tokens exceed the cache's {self.cache.capacity}"
        if isinstance(start, int):
            self.keys_BKTC[:, :, start:end] = keys_BKTC
            self.values_BKTC[:, :, start:end] = values_BKTC
        else:
            rows_B = torch.arange(len(start), device=start.device)
            self.keys_BKTC[rows_B, :, start] = keys_BKTC.squeeze(2)
            self.values_BKTC[rows_B, :, start] = values_BKTC.squeeze(2)
        return self.keys_BKTC[:, :, :end], self.values_BKTC[:, :, :end]
