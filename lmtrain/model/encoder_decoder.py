"""The encoder-decoder for pairs: an encoder that reads a source, a decoder that says its target while looking at it.

In shapes S is the length of the sources, T that of the targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from lmtrain.config.schema import EncoderDecoderConfig
from lmtrain.model.attend import Visible, chooses_flex, visible_past
from lmtrain.model.attention import CrossAttention, KeysAndValues
from lmtrain.model.cache import KeyValueCache, LayerCache, Memory
from lmtrain.model.decoder import Block
from lmtrain.model.layers import build_norm
from lmtrain.model.positions import AddedPositions, Rotation, build_added_positions
from lmtrain.model.transformer import ReadOut, Transformer, places_of


class DecoderBlock(Block):
    """A block that also looks at the source, between attention to its own tokens and the feed-forward."""

    def __init__(self, config: EncoderDecoderConfig, *, dropout: float) -> None:
        super().__init__(config, dropout=dropout)
        self.cross_attention_norm = build_norm(config)
        self.cross_attention = CrossAttention(config, dropout=dropout)

    def source(self, encoded_BSD: Tensor) -> KeysAndValues:
        """What the block sees of encoded sources."""
        return self.cross_attention.keys_and_values(encoded_BSD)

    def forward(  # type: ignore[override]
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        cache: LayerCache | None,
        visible: Visible,
        source: KeysAndValues,
        visible_source: Visible,
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotation, cache, visible))
        crossed_BTD = self.cross_attention(self.cross_attention_norm(x_BTD), source, visible_source)
        x_BTD = x_BTD + self.dropout(crossed_BTD)
        x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD


class EncoderDecoder(Transformer):
    """After Vaswani et al. (arXiv:1706.03762), with pre-normalisation and one embedding of sources and targets.

    Positions are those of the config in each of the two stacks; attention to the source has none of its own.
    """

    config: EncoderDecoderConfig
    encoder_blocks: nn.ModuleList
    encoder_position: AddedPositions | None
    encoder_norm: nn.Module

    def __init__(self, config: EncoderDecoderConfig, *, vocab_size: int, seq_len: int, dropout: float) -> None:
        stacks: dict[str, nn.Module | None] = {
            "encoder_position": build_added_positions(config, seq_len=seq_len),
            "encoder_blocks": nn.ModuleList(Block(config, dropout=dropout) for _ in range(config.num_encoder_layers)),
            "encoder_norm": build_norm(config),
            "blocks": nn.ModuleList(DecoderBlock(config, dropout=dropout) for _ in range(config.num_decoder_layers)),
        }
        super().__init__(config, stacks, vocab_size=vocab_size, seq_len=seq_len, dropout=dropout)

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache | None = None,
        sources_BS: Tensor | None = None,
        source_mask_BS: Tensor | None = None,
        read_out: ReadOut | None = None,
    ) -> Tensor:
        """Tokens [B, T] int64 of targets to logits [B, T, V], or what `read_out` makes; T and S are at most seq_len.

        `sources_BS` are what the targets answer, `source_mask_BS` is True where they hold a token. With a cache that
        was made with the memory of `encode`, both are left out, and tokens_BT continues each row as in a `Decoder`.
        """
        return self._read_out(self.read(tokens_BT, cache, sources_BS, source_mask_BS), read_out)

    def read(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache | None = None,
        sources_BS: Tensor | None = None,
        source_mask_BS: Tensor | None = None,
    ) -> Tensor:
        """What `forward` computes before the last norm, [B, T, D]."""
        if cache is None:
            assert sources_BS is not None, "there is no source"
            memory = self.encode(sources_BS, source_mask_BS)
        else:
            assert sources_BS is None, "a cache has its source already"
            assert cache.memory is not None, "the cache was made without a source"
            memory = cache.memory
        length = tokens_BT.size(1)
        self._require_room(length, cache)
        x_BTD = self._embed(tokens_BT, places_of(length, cache), self.position)
        rotation = None if self.rotary is None else self.rotary(0 if cache is None else cache.start, length)
        visible = self._visible(length, cache)
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else cache.layers[i]
            x_BTD = block(x_BTD, rotation, layer, visible, memory.layers[i], memory.visible)
        if cache is not None:
            cache.advance(length)
        return x_BTD

    def encode(self, sources_BS: Tensor, source_mask_BS: Tensor | None = None) -> Memory:
        """What the decoder sees of sources [B, S] int64, filled up at the right where the mask [B, S] bool is False."""
        length = sources_BS.size(1)
        self._require_room(length, None)
        visible = Visible(mask=None if source_mask_BS is None else source_mask_BS.unsqueeze(1))
        x_BSD = self._embed(sources_BS, slice(0, length), self.encoder_position)
        rotation = None if self.rotary is None else self.rotary(0, length)
        for block in self.encoder_blocks:
            x_BSD = block(x_BSD, rotation, None, visible)
        encoded_BSD = self.encoder_norm(x_BSD)
        return Memory([cast(DecoderBlock, block).source(encoded_BSD) for block in self.blocks], visible)

    def all_blocks(self) -> Iterator[nn.Module]:
        """Those of the encoder, then those of the decoder."""
        yield from self.encoder_blocks
        yield from self.blocks

    def _visible(self, length: int, cache: KeyValueCache | None) -> Visible:
        if cache is not None and length == 1:
            return cache.visible()
        flex = chooses_flex(self.config.attention, self.device, sparse=False, dropout=0.0)
        return visible_past(length, self.device, flex=flex)
