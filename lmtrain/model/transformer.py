"""What all architectures share: the embedding of tokens, their positions, the logits, and the calling convention.

Not here: how blocks are stacked (`decoder.py`, `encoder_decoder.py`). The loss is the trainer's; sampling is in
`generation.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.config.schema import TransformerConfig
from lmtrain.model.cache import KeyValueCache, Memory
from lmtrain.model.layers import Embedding, Linear, build_norm
from lmtrain.model.positions import AddedPositions, build_added_positions, build_rotary
from lmtrain.model.sizing import VOCAB_MULTIPLE

Places = slice | Tensor
"""Positions of the tokens of all rows, or [B, T] of each."""

ReadOut = Callable[[Tensor, Callable[[Tensor], Tensor]], Any]
"""From what the last block gave, and the function that makes logits of it, to anything: losses without all logits."""


class Transformer(nn.Module):
    """Logits of the next token at every position, from the tokens up to it.

    Dropout, at one rate, acts on the embedding, on attention probabilities and on the output of each sublayer. The
    weights are unset until `initialize` has run; `build_model` does both.
    """

    blocks: nn.ModuleList  # of the decoder
    pad_vocab = False  # whether logits are computed for a multiple of VOCAB_MULTIPLE tokens, and those too many cut off

    def __init__(
        self,
        config: TransformerConfig,
        stacks: Mapping[str, nn.Module | None],
        *,
        vocab_size: int,
        seq_len: int,
        dropout: float,
    ) -> None:
        """`stacks`: the modules between embedding and logits, by name; initial values are drawn in their order."""
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.embedding = Embedding(vocab_size, config.d_model)
        self.position = build_added_positions(config, seq_len=seq_len)
        self.rotary = build_rotary(config, seq_len=seq_len)
        self.dropout = nn.Dropout(dropout)
        for name, stack in stacks.items():
            self.add_module(name, stack)
        self.norm = build_norm(config)
        self.head = None if config.tie_embeddings else Linear(config.d_model, vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def new_cache(
        self, batch_size: int = 1, capacity: int | None = None, memory: Memory | None = None
    ) -> KeyValueCache:
        """An empty cache for `capacity` tokens a row (None: seq_len), on the model's device, in its number format.

        `memory` is what `EncoderDecoder.encode` gave of the rows' sources.
        """
        return KeyValueCache(
            num_layers=len(self.blocks),
            head_shape=(self.config.kv_heads, self.config.head_dim),
            batch_size=batch_size,
            capacity=capacity or self.seq_len,
            like=self.embedding.weight,
            memory=memory,
        )

    def all_blocks(self) -> Iterator[nn.Module]:
        """Those of the encoder, if there is one, and of the decoder."""
        yield from self.blocks

    def block_matrices(self) -> list[nn.Parameter]:
        """The weight matrices inside the blocks, in the order of the layers.

        Those that Muon is made for: no embedding, head or norm. Queries, keys and values are one matrix here,
        as are gate and value of a gated feed-forward.
        """
        return [parameter for block in self.all_blocks() for parameter in block.parameters() if parameter.ndim == 2]

    def _embed(self, tokens_BT: Tensor, places: Places, position: AddedPositions | None) -> Tensor:
        x_BTD: Tensor = self.embedding(tokens_BT)
        if position is not None:
            x_BTD = x_BTD + (position.weight[places] if isinstance(places, slice) else position(places))
        dropped_BTD: Tensor = self.dropout(x_BTD)
        return dropped_BTD

    def _read_out(self, x_BTD: Tensor, read_out: ReadOut | None) -> Tensor:
        """The logits of what the last block gave, [B, T, V], or what `read_out` makes of it with the way to logits."""
        logits_of = functools.partial(self._logits, self._output_matrix())
        return logits_of(x_BTD) if read_out is None else read_out(x_BTD, logits_of)

    def _output_matrix(self) -> Tensor:
        """[V, D]; with `pad_vocab` rows of zeros at its end make it a multiple, in the product's number format."""
        head_VD = self.embedding.weight if self.head is None else self.head.weight
        missing = -self.vocab_size % VOCAB_MULTIPLE
        if not self.pad_vocab or not missing:
            return head_VD
        if torch.is_autocast_enabled(head_VD.device.type):
            head_VD = head_VD.to(torch.get_autocast_dtype(head_VD.device.type))
        return F.pad(head_VD, (0, 0, 0, missing))

    def _logits(self, head_VD: Tensor, x_BTD: Tensor) -> Tensor:
        """Of what the last block gave, [B, T, V]. A soft cap is that of Gemma 2 (arXiv:2408.00118, section 2)."""
        logits_BTV = F.linear(self.norm(x_BTD), head_VD)
        if head_VD.size(0) > self.vocab_size:
            logits_BTV = logits_BTV[..., : self.vocab_size]
        if (softcap := self.config.logit_softcap) is not None:
            logits_BTV = softcap * torch.tanh(logits_BTV / softcap)
        return logits_BTV

    def _require_room(self, length: int, cache: KeyValueCache | None) -> None:
        end = length + (0 if cache is None else cache.longest)
        assert end <= self.seq_len, f"{end} tokens exceed seq_len {self.seq_len}"


def places_of(length: int, cache: KeyValueCache | None) -> Places:
    """Of so many new tokens after those in the cache."""
    start = 0 if cache is None else cache.start
    return start.unsqueeze(1) if isinstance(start, Tensor) else slice(start, start + length)
