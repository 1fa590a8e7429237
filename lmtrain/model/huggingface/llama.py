"""The Llama format: RMSNorm, rotary positions, a gated feed-forward.

Names and defaults are those of `LlamaConfig` and `LlamaForCausalLM` in transformers 5; rotary settings are written in
the words of transformers 4 as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmtrain.config.schema import DecoderConfig
from lmtrain.errors import CheckpointError
from lmtrain.model.huggingface.formats import Described, Format, Place, biased, require_known

ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}  # of the gate; "gelu" is the exact one


class Llama(Format):
    """`LlamaForCausalLM`."""

    name = "Llama"
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    prefix = "model."
    always_biased = False
    unused = ("rotary_emb.inv_freq",)

    def room(self, config: DecoderConfig) -> Mapping[str, tuple[object, ...]]:
        return {
            "norm": ("rmsnorm",),
            "position": ("rotary",),
            "activation": tuple(ACTIVATIONS),
        }

    def describe(self, described: Described) -> dict[str, Any]:
        config = described.config
        return {
            "vocab_size": described.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.hidden_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": ACTIVATIONS[config.activation],
            "max_position_embeddings": described.seq_len,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
            "attention_dropout": 0.0,
            **_rotation(config),
        }

    def parse(self, values: Mapping[str, Any]) -> Described:
        heads, width = values["num_attention_heads"], values["hidden_size"]
        known_activations = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
        known = {"hidden_act": known_activations, "head_dim": (width / heads,), "partial_rotary_factor": (1,)}
        require_known(values, known)
        return Described(
            config=DecoderConfig(
                d_model=width,
                num_layers=values["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=values.get("num_key_value_heads") or heads,
                d_ff=values["intermediate_size"],
                norm="rmsnorm",
                norm_eps=values.get("rms_norm_eps", 1e-6),
                activation=known_activations[values.get("hidden_act", "silu")],  # type: ignore[arg-type]
                tie_embeddings=values.get("tie_word_embeddings", False),
                position="rotary",
                **_parse_rotation(values),
            ),
            vocab_size=values["vocab_size"],
            seq_len=values.get("max_position_embeddings", 2048),
        )

    def places(self, config: DecoderConfig) -> dict[str, Place]:
        queries, keys = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
        maps, norms = {}, {"norm.weight": Place(("model.norm.weight",))}
        for layer in range(config.num_layers):
            ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            heads = tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
            halves = tuple(f"{theirs}.mlp.{name}_proj.weight" for name in ("gate", "up"))
            maps[f"{ours}.attention.qkv.weight"] = Place(heads, (queries, keys, keys))
            maps[f"{ours}.attention.output.weight"] = Place((f"{theirs}.self_attn.o_proj.weight",))
            maps[f"{ours}.feed_forward.up.weight"] = Place(halves, (config.hidden_dim, config.hidden_dim))
            maps[f"{ours}.feed_forward.down.weight"] = Place((f"{theirs}.mlp.down_proj.weight",))
            norms[f"{ours}.attention_norm.weight"] = Place((f"{theirs}.input_layernorm.weight",))
            norms[f"{ours}.feed_forward_norm.weight"] = Place((f"{theirs}.post_attention_layernorm.weight",))
        embedding = {"embedding.weight": Place(("model.embed_tokens.weight",))}
        head = {} if config.tie_embeddings else {"head.weight": Place(("lm_head.weight",))}
        return embedding | biased(maps) | norms | head


def _rotation(config: DecoderConfig) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` is read by transformers 5, the other two by both."""
    if config.rope_scaling != "linear":
        theta = config.rope_base
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    scaling = {"rope_type": "linear", "factor": float(config.rope_factor)}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
    }


def _parse_rotation(values: Mapping[str, Any]) -> dict[str, Any]:
    """Our rotary settings."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require_known(rope, {"partial_rotary_factor": (1,)})
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "linear":
        raise CheckpointError(
            f"its config.json scales rotary positions by rope_type={kind}; there are default and linear here"
        )
    return {"rope_theta": theta, "rope_scaling": "linear", "rope_factor": rope["factor"]}
