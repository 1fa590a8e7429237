"""The attention sublayers: to oneself, and to a source. Projections, heads and their norms.

Not here: positions (`positions.py`), who sees whom and how it is computed (`attend.py`), the cache (`cache.py`). In
shapes B is batch, T time, S keys, D width, H query heads, K key and value heads, C the width of a head.
"""

from __future__ import annotations

from torch import Tensor, nn

from lmtrain.config.schema import TransformerConfig
from lmtrain.model.attend import PAST, Visible, attend
from lmtrain.model.cache import LayerCache
from lmtrain.model.fused import rms_normalised
from lmtrain.model.layers import Linear
from lmtrain.model.positions import Rotation, rotate

KeysAndValues = tuple[Tensor, Tensor]  # each [B, K, S, C]


class _Attention(nn.Module):
    """What both have in common.

    With fewer key heads than query heads, these are grouped (arXiv:2305.13245). `qk_norm` divides queries and keys by
    their root mean square per head, without a gain (after Henry et al., arXiv:2010.04245), before they are rotated.
    """

    output: Linear  # [D, D]

    def __init__(self, config: TransformerConfig, *, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.qk_norm_eps = config.norm_eps if config.qk_norm else None
        self.dropout = dropout
        self.implementation = config.attention

    def _normalised(self, heads_BTHC: Tensor) -> Tensor:
        if self.qk_norm_eps is None:
            return heads_BTHC
        return rms_normalised(heads_BTHC, self.qk_norm_eps)

    def _attend(self, q_BHTC: Tensor, keys_and_values: KeysAndValues, visible: Visible) -> Tensor:
        attended_BHTC = attend(
            q_BHTC,
            *keys_and_values,
            visible,
            dropout=self.dropout if self.training else 0.0,
            implementation=self.implementation,
        )
        output_BTD: Tensor = self.output(attended_BHTC.transpose(1, 2).flatten(2))
        return output_BTD


class SelfAttention(_Attention):
    """Multi-head attention among the tokens of a row.

    The rows of `qkv.weight` [(H + 2K) C, D] are the queries, then the keys, then the values, head by head: one matrix
    product for all three.
    """

    def __init__(self, config: TransformerConfig, *, dropout: float) -> None:
        super().__init__(config, dropout=dropout)
        num_heads = config.num_heads + 2 * config.kv_heads
        self.qkv = Linear(config.d_model, num_heads * config.head_dim, bias=config.bias)
        self.output = Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        visible: Visible = PAST,
    ) -> Tensor:
        """[B, T, D] → [B, T, D]; with a cache, x holds the new tokens: all of an empty cache's, or one."""
        num_qk_heads = self.num_heads + self.num_kv_heads
        qkv_BTHC = self.qkv(x_BTD).unflatten(-1, (num_qk_heads + self.num_kv_heads, self.head_dim))
        heads = self.num_heads, self.num_kv_heads
        if rotation is None and self.qk_norm_eps is None:
            q_BTHC, k_BTKC, v_BTKC = qkv_BTHC.split((*heads, self.num_kv_heads), dim=2)
        else:  # queries and keys are treated alike, so both are normalised and rotated in one go
            qk_BTHC, v_BTKC = qkv_BTHC.split((num_qk_heads, self.num_kv_heads), dim=2)
            qk_BTHC = self._normalised(qk_BTHC)
            qk_BTHC = qk_BTHC if rotation is None else rotate(qk_BTHC, rotation)
            q_BTHC, k_BTKC = qk_BTHC.split(heads, dim=2)  # type: ignore[no-untyped-call]
        keys_and_values = k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2)
        if cache is not None:
            keys_and_values = cache.append(*keys_and_values)
        return self._attend(q_BTHC.transpose(1, 2), keys_and_values, visible)


class CrossAttention(_Attention):
    """Multi-head attention of the tokens of a target to those of its source.

    The rows of `key_value.weight` [2 K C, D] are the keys, then the values, head by head.
    """

    def __init__(self, config: TransformerConfig, *, dropout: float) -> None:
        super().__init__(config, dropout=dropout)
        self.query = Linear(config.d_model, config.d_model, bias=config.bias)
        self.key_value = Linear(config.d_model, 2 * config.kv_heads * config.head_dim, bias=config.bias)
        self.output = Linear(config.d_model, config.d_model, bias=config.bias)

    def keys_and_values(self, source_BSD: Tensor) -> KeysAndValues:
        """Of an encoded source: the same for every token of the target."""
        kv_BSKC = self.key_value(source_BSD).unflatten(-1, (2 * self.num_kv_heads, self.head_dim))
        k_BSKC, v_BSKC = kv_BSKC.chunk(2, dim=2)
        return self._normalised(k_BSKC).transpose(1, 2), v_BSKC.transpose(1, 2)

    def forward(self, x_BTD: Tensor, keys_and_values: KeysAndValues, visible: Visible) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        q_BTHC = self._normalised(self.query(x_BTD).unflatten(-1, (self.num_heads, self.head_dim)))
        return self._attend(q_BTHC.transpose(1, 2), keys_and_values, visible)
