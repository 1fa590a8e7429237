"""Transformers written out again with loops in float64, one sequence at a time, sharing none of the model's code.

What the models are compared with. Slow and plain on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig, TransformerConfig

Weights = dict[str, Tensor]


def decoder_logits(config: DecoderConfig, state: Weights, tokens_T: Tensor) -> Tensor:
    """[T, V] of a decoder with these settings and weights."""
    weights = {name: value.double() for name, value in state.items()}
    x = embedded(tokens_T, weights, "position", config)
    for i in range(config.num_layers):
        block = within(weights, f"blocks.{i}.")
        x = x + self_attention(norm(x, block, "attention_norm", config), within(block, "attention."), config)
        x = x + feed_forward(norm(x, block, "feed_forward_norm", config), within(block, "feed_forward."), config)
    return logits(x, weights, config)


def encoder_decoder_logits(config: EncoderDecoderConfig, state: Weights, tokens_T: Tensor, sources_S: Tensor) -> Tensor:
    """[T, V] of an encoder-decoder with these settings and weights, for one target and its source."""
    weights = {name: value.double() for name, value in state.items()}
    source = embedded(sources_S, weights, "encoder_position", config)
    for i in range(config.num_encoder_layers):
        block = within(weights, f"encoder_blocks.{i}.")
        normed = norm(source, block, "attention_norm", config)
        source = source + self_attention(normed, within(block, "attention."), config, causal=False)
        normed = norm(source, block, "feed_forward_norm", config)
        source = source + feed_forward(normed, within(block, "feed_forward."), config)
    source = norm(source, weights, "encoder_norm", config)
    x = embedded(tokens_T, weights, "position", config)
    for i in range(config.num_decoder_layers):
        block = within(weights, f"blocks.{i}.")
        x = x + self_attention(norm(x, block, "attention_norm", config), within(block, "attention."), config)
        normed = norm(x, block, "cross_attention_norm", config)
        x = x + cross_attention(normed, source, within(block, "cross_attention."), config)
        x = x + feed_forward(norm(x, block, "feed_forward_norm", config), within(block, "feed_forward."), config)
    return logits(x, weights, config)


def within(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))


def norm(x: Tensor, weights: Weights, name: str, config: TransformerConfig) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if config.norm == "layernorm" else x
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + config.norm_eps)
    return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))


def embedded(tokens: Tensor, weights: Weights, table: str, config: TransformerConfig) -> Tensor:
    x = weights["embedding.weight"][tokens]
    if config.position == "learned":
        x = x + weights[f"{table}.weight"][: len(tokens)]
    if config.position == "sinusoidal":
        for place in range(len(tokens)):
            for channel in range(config.d_model):
                angle = place / 10000 ** (2 * (channel // 2) / config.d_model)
                x[place, channel] += config.init_std * (math.cos(angle) if channel % 2 else math.sin(angle))
    return x


def rotated(vector: Tensor, position: int, config: TransformerConfig) -> Tensor:
    """Each pair (i, i + C/2) as a complex number, turned by position · theta^(-2i/C)."""
    width, theta, place = vector.numel(), config.rope_theta, float(position)
    if config.rope_scaling == "linear":
        place /= config.rope_factor
    if config.rope_scaling == "ntk":
        theta *= config.rope_factor ** (width / (width - 2))
    half = width // 2
    turned = torch.empty_like(vector)
    for i in range(half):
        angle = place * theta ** (-2 * i / width)
        number = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        turned[i], turned[i + half] = number.real, number.imag
    return turned


def qk_normed(x: Tensor, config: TransformerConfig) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + config.norm_eps) if config.qk_norm else x


def mixed(q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]], config: TransformerConfig) -> Tensor:
    """Queries [T, H, C] over the keys [S, K, C] that each of them sees, heads side by side [T, H C]."""
    rows = []
    for t, keys in enumerate(seen):
        row = []
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.kv_heads)
            scores = torch.stack([q[t, head] @ k[s, shared] / math.sqrt(config.head_dim) for s in keys])
            row.append(sum(p * v[s, shared] for s, p in zip(keys, scores.softmax(0), strict=True)))
        rows.append(torch.cat([torch.as_tensor(part) for part in row]))
    return torch.stack(rows)


def self_attention(x: Tensor, weights: Weights, config: TransformerConfig, *, causal: bool = True) -> Tensor:
    heads, kv_heads, width = config.num_heads, config.kv_heads, config.head_dim
    projected = linear(x, weights, "qkv").view(len(x), heads + 2 * kv_heads, width)
    q, k = qk_normed(projected[:, :heads], config), qk_normed(projected[:, heads : heads + kv_heads], config)
    if config.position == "rotary":
        q, k = (
            torch.stack([torch.stack([rotated(vector, t, config) for vector in row]) for t, row in enumerate(part)])
            for part in (q, k)
        )
    window = getattr(config, "sliding_window", None) or len(x)
    seen = [[s for s in range(t + 1) if t - s < window] if causal else list(range(len(x))) for t in range(len(x))]
    return linear(mixed(q, k, projected[:, heads + kv_heads :], seen, config), weights, "output")


def cross_attention(x: Tensor, source: Tensor, weights: Weights, config: TransformerConfig) -> Tensor:
    kv_heads, width = config.kv_heads, config.head_dim
    q = qk_normed(linear(x, weights, "query").view(len(x), config.num_heads, width), config)
    projected = linear(source, weights, "key_value").view(len(source), 2 * kv_heads, width)
    k = qk_normed(projected[:, :kv_heads], config)
    seen = [list(range(len(source)))] * len(x)
    return linear(mixed(q, k, projected[:, kv_heads:], seen, config), weights, "output")


def feed_forward(x: Tensor, weights: Weights, config: TransformerConfig) -> Tensor:
    def gelu(z: Tensor) -> Tensor:
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    hidden = linear(x, weights, "up")
    gate, value = hidden[:, : config.hidden_dim], hidden[:, config.hidden_dim :]
    if config.activation == "swiglu":
        hidden = gate / (1 + torch.exp(-gate)) * value
    elif config.activation == "geglu":
        hidden = gelu(gate) * value
    elif config.activation == "gelu":
        hidden = gelu(hidden)
    elif config.activation == "gelu_tanh":
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    else:
        hidden = torch.where(hidden > 0, hidden**2, 0.0)
    return linear(hidden, weights, "down")


def logits(x: Tensor, weights: Weights, config: TransformerConfig) -> Tensor:
    head = weights["embedding.weight" if config.tie_embeddings else "head.weight"]
    raw = norm(x, weights, "norm", config) @ head.T
    return raw if config.logit_softcap is None else config.logit_softcap * torch.tanh(raw / config.logit_softcap)
