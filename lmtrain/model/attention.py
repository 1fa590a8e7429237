"""Causal self-attention: heads and rotary positions.

Not here: learned positions, which are added to the embedding (`decoder.py`); the cache (`cache.py`). In shapes B is
batch, T time, D width, H query heads, K key and value heads, C the width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.cache import LayerCache
from lmtrain.model.layers import Linear

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, each [T, 1, C], or [B, 1, 1, C] of one token a row


class RotaryTable(nn.Module):
    """The angles of rotary positions (Su et al., arXiv:2104.09864), in fp32, not part of the saved weights.

    Channel i turns together with channel i + C/2, as in Llama; the sines of the first half carry the minus
    sign of the rotation.
    """

    cos: Tensor  # [seq_len, 1, C]
    sin: Tensor

    def __init__(self, head_dim: int, *, seq_len: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), theta**-exponents)
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1).unsqueeze(1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1).unsqueeze(1), persistent=False)

    def forward(self, start: int | Tensor, length: int) -> Rotation:
        """The rotation of positions start … start + length - 1; of one token a row if there is a start a row."""
        if isinstance(start, Tensor):
            return self.cos[start].unsqueeze(1), self.sin[start].unsqueeze(1)
        return self.cos[start : start + length], self.sin[start : start + length]


def rotate(x_BTHC: Tensor, rotation: Rotation) -> Tensor:
    """Turn every head by the angles of its position: in fp32, returned in the type of x."""
    cos_T1C, sin_T1C = rotation
    swapped_BTHC = x_BTHC.roll(x_BTHC.size(-1) // 2, dims=-1)
    return torch.addcmul(x_BTHC * cos_T1C, swapped_BTHC, sin_T1C).type_as(x_BTHC)


def visible_within_documents(documents_BT: Tensor) -> Tensor:
    """Which tokens each one sees, [B, T, T] bool: itself and those before it with the same number.

    Rotary positions need no reset at a new document: a score depends on the distance of two tokens alone.
    """
    same_BTT = documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)
    return same_BTT.tril()


class CausalSelfAttention(nn.Module):
    """Multi-head attention to oneself and the past; with fewer key heads, grouped (arXiv:2305.13245).

    The rows of `qkv.weight` [(H + 2K) C, D] are the queries, then the keys, then the values, head by head:
    one matrix product for all three. `qk_norm` divides queries and keys by their root mean square per head,
    without a gain (after Henry et al., arXiv:2010.04245), before they are rotated.
    """

    def __init__(self, config: DecoderConfig, *, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.qk_norm_eps = config.norm_eps if config.qk_norm else None
        self.dropout = dropout
        self.qkv = Linear(config.d_model, (config.num_heads + 2 * config.kv_heads) * config.head_dim)
        self.output = Linear(config.d_model, config.d_model)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        visible_BTT: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D]; with a cache, x holds the new tokens: all of an empty cache's, or one.

        `visible_BTT` tells what is seen of the past, if not all of it.
        """
        num_qk_heads = self.num_heads + self.num_kv_heads
        qkv_BTHC = self.qkv(x_BTD).unflatten(-1, (num_qk_heads + self.num_kv_heads, self.head_dim))
        # Queries and keys are treated alike, so both are normalised and rotated in one go.
        qk_BTHC, v_BTKC = qkv_BTHC.split((num_qk_heads, self.num_kv_heads), dim=2)
        if self.qk_norm_eps is not None:
            qk_BTHC = F.rms_norm(qk_BTHC, (self.head_dim,), eps=self.qk_norm_eps)
        if rotation is not None:
            qk_BTHC = rotate(qk_BTHC, rotation)
        q_BHTC, k_BKTC = qk_BTHC.transpose(1, 2).split((self.num_heads, self.num_kv_heads), dim=1)
        v_BKTC = v_BTKC.transpose(1, 2)

        if cache is not None:
            k_BKTC, v_BKTC = cache.append(k_BKTC, v_BKTC)
        single = q_BHTC.size(2) == 1  # one query sees every key, so those of a group go together: no key is repeated
        if single:
            q_BHTC = q_BHTC.reshape(q_BHTC.size(0), self.num_kv_heads, -1, self.head_dim)
        attended_BHTC = F.scaled_dot_product_attention(
            q_BHTC,
            k_BKTC,
            v_BKTC,
            dropout_p=self.dropout if self.training else 0.0,
            attn_mask=None if visible_BTT is None else visible_BTT.unsqueeze(1),
            is_causal=visible_BTT is None and not single,
            enable_gqa=q_BHTC.size(1) != self.num_kv_heads,
        )
        if single:
            attended_BHTC = attended_BHTC.reshape(-1, self.num_heads, 1, self.head_dim)
        output_BTD: Tensor = self.output(attended_BHTC.transpose(1, 2).flatten(2))
        return output_BTD
