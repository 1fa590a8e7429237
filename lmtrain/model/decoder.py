"""The decoder-only language model: embedding, blocks with pre-normalisation, logits.

Owns how the layers are stacked. The loss is the trainer's; sampling is in `generation.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.config.schema import DecoderConfig, ModelConfig
from lmtrain.model.attention import CausalSelfAttention, RotaryTable, Rotation, visible_within_documents
from lmtrain.model.cache import KeyValueCache, LayerCache
from lmtrain.model.initialization import initialize
from lmtrain.model.layers import Embedding, FeedForward, Linear, build_norm


class Block(nn.Module):
    """Attention and feed-forward, each normalised before, dropped out after, and added to its input."""

    def __init__(self, config: DecoderConfig, *, dropout: float) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = CausalSelfAttention(config, dropout=dropout)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        visible_BTT: Tensor | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rotation, cache, visible_BTT))
        x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD


class Decoder(nn.Module):
    """Logits of the next token at every position, from the tokens up to it.

    Dropout, at one rate, acts on the embedding, on attention probabilities and on the output of each
    sublayer. The weights are unset until `initialize` has run; `build_model` does both.
    """

    def __init__(self, config: DecoderConfig, *, vocab_size: int, seq_len: int, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        rotary = config.position == "rotary"
        self.embedding = Embedding(vocab_size, config.d_model)
        self.position = None if rotary else Embedding(seq_len, config.d_model)
        self.rotary = RotaryTable(config.head_dim, seq_len=seq_len, theta=config.rope_theta) if rotary else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(config, dropout=dropout) for _ in range(config.num_layers))
        self.norm = build_norm(config)
        self.head = None if config.tie_embeddings else Linear(config.d_model, vocab_size)

    def forward(
        self, tokens_BT: Tensor, cache: KeyValueCache | None = None, documents_BT: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, T] int64, T at most seq_len, to logits [B, T, V].

        With a cache from `new_cache`, tokens_BT continues each row that it holds, and is added to it: the whole
        beginning in the first call, one token in each later one. `documents_BT` numbers the documents of each row,
        growing from left to right: each gets the logits it gets alone.
        """
        head_VD = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.norm(self.read(tokens_BT, cache, documents_BT)), head_VD)

    def read(self, tokens_BT: Tensor, cache: KeyValueCache | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """What `forward` computes before the last norm, [B, T, D]: all there is to do if only the cache is wanted."""
        assert cache is None or documents_BT is None, "a cache is of one document"
        start, visible_BTT = (0, None) if cache is None else (cache.start, cache.visible)
        length = tokens_BT.size(1)
        end = length + (0 if cache is None else cache.longest)
        assert end <= self.seq_len, f"{end} tokens exceed seq_len {self.seq_len}"
        if documents_BT is not None:
            visible_BTT = visible_within_documents(documents_BT)
        x_BTD: Tensor = self.embedding(tokens_BT)
        if self.position is not None and visible_BTT is not None:
            x_BTD = x_BTD + self.position(visible_BTT.sum(dim=2) - 1)  # so many tokens of its document precede
        elif self.position is not None:
            x_BTD = x_BTD + self.position.weight[start : start + length]
        rotation = self.rotary(start, length) if self.rotary is not None else None
        x_BTD = self.dropout(x_BTD)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotation, None if cache is None else cache.layers[i], visible_BTT)
        if cache is not None:
            cache.advance(length)
        return x_BTD

    def new_cache(self, batch_size: int = 1, capacity: int | None = None) -> KeyValueCache:
        """An empty cache for `capacity` tokens a row (None: seq_len), on the model's device, in its number format."""
        return KeyValueCache(
            self.config, batch_size=batch_size, capacity=capacity or self.seq_len, like=self.embedding.weight
        )

    def block_matrices(self) -> list[nn.Parameter]:
        """The weight matrices inside the blocks, in the order of the layers.

        Those that Muon is made for: no embedding, head or norm. Queries, keys and values are one matrix here,
        as are gate and value of a gated feed-forward.
        """
        return [parameter for parameter in self.blocks.parameters() if parameter.ndim == 2]


def build_model(config: ModelConfig, *, vocab_size: int, seq_len: int, dropout: float) -> Decoder:
    """The model that the config describes, initialised from PyTorch's global random state.

    Args:
        vocab_size: number of token ids; seq_len: the longest context, in tokens; dropout: one rate for all.

    Under `torch.device("meta")` it takes no memory and no random numbers.
    """
    if not isinstance(config, DecoderConfig):
        raise TypeError(f"no model is built from {type(config).__name__}")
    model = Decoder(config, vocab_size=vocab_size, seq_len=seq_len, dropout=dropout)
    with torch.no_grad():
        initialize(model, config)
    return model
