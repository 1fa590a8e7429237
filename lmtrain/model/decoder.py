"""The decoder-only language model: blocks with pre-normalisation over the tokens of a row."""

from __future__ import annotations

from torch import Tensor, nn

from lmtrain.config.schema import DecoderConfig, TransformerConfig
from lmtrain.model.attend import PAST, Visible, chooses_flex, visible_past
from lmtrain.model.attention import SelfAttention
from lmtrain.model.cache import KeyValueCache, LayerCache
from lmtrain.model.layers import FeedForward, build_norm
from lmtrain.model.positions import Rotation, places_within_documents
from lmtrain.model.transformer import ReadOut, Transformer, places_of


class Block(nn.Module):
    """Attention and feed-forward, each normalised before, dropped out after, and added to its input."""

    def __init__(self, config: TransformerConfig, *, dropout: float) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = SelfAttention(config, dropout=dropout)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        visible: Visible = PAST,
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotation, cache, visible))
        x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD


class Decoder(Transformer):
    """A stack of blocks; each token sees itself and those before it, or the last `sliding_window` of them."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig, *, vocab_size: int, seq_len: int, dropout: float) -> None:
        blocks = nn.ModuleList(Block(config, dropout=dropout) for _ in range(config.num_layers))
        super().__init__(config, {"blocks": blocks}, vocab_size=vocab_size, seq_len=seq_len, dropout=dropout)

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache | None = None,
        documents_BT: Tensor | None = None,
        read_out: ReadOut | None = None,
    ) -> Tensor:
        """Tokens [B, T] int64, T at most seq_len, to logits [B, T, V], or to what `read_out` makes of the way to them.

        With a cache from `new_cache`, tokens_BT continues each row that it holds, and is added to it: the whole
        beginning in the first call, one token in each later one. `documents_BT` numbers the documents of each row,
        growing from left to right: each gets the logits it gets alone.
        """
        return self._read_out(self.read(tokens_BT, cache, documents_BT), read_out)

    def read(self, tokens_BT: Tensor, cache: KeyValueCache | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """What `forward` computes before the last norm, [B, T, D]: all there is to do if only the cache is wanted."""
        assert cache is None or documents_BT is None, "a cache is of one document"
        length = tokens_BT.size(1)
        self._require_room(length, cache)
        places = places_of(length, cache)
        if documents_BT is not None and self.position is not None:
            places = places_within_documents(documents_BT)
        x_BTD = self._embed(tokens_BT, places, self.position)
        # Rotated as in the row: a score depends on the distance of two tokens alone, so documents need no reset.
        rotation = None if self.rotary is None else self.rotary(0 if cache is None else cache.start, length)
        visible = self._visible(length, cache, documents_BT)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotation, None if cache is None else cache.layers[i], visible)
        if cache is not None:
            cache.advance(length)
        return x_BTD

    def _visible(self, length: int, cache: KeyValueCache | None, documents_BT: Tensor | None) -> Visible:
        window = self.config.sliding_window
        if cache is not None and length == 1:
            return cache.visible(window)
        sparse = documents_BT is not None or (window is not None and window < length)
        dropout = self.dropout.p if self.training else 0.0
        flex = chooses_flex(self.config.attention, self.device, sparse=sparse, dropout=dropout)
        return visible_past(length, self.device, documents_BT=documents_BT, window=window, flex=flex)
