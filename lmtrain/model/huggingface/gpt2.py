"""The GPT-2 format: LayerNorm, learned positions, a bias in every map and norm.

Names and defaults are those of `GPT2Config` and `GPT2LMHeadModel` in transformers 5. Its matrices stand transposed
(`Conv1D`). A model without biases is written with zeros, which is the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.huggingface.formats import Described, Format, Place, biased, require_known

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu2": "relu2"}  # "gelu" is the exact one


class Gpt2(Format):
    """`GPT2LMHeadModel`."""

    name = "GPT-2"
    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    always_biased = True
    unused = (".attn.bias", ".attn.masked_bias")  # causal masks

    def room(self, config: DecoderConfig) -> Mapping[str, tuple[object, ...]]:
        return {
            "norm": ("layernorm",),
            "position": ("learned",),
            "num_kv_heads": (None, config.num_heads),
            "activation": tuple(ACTIVATIONS),
        }

    def describe(self, described: Described) -> dict[str, Any]:
        config = described.config
        return {
            "vocab_size": described.vocab_size,
            "n_embd": config.d_model,
            "n_inner": config.hidden_dim,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "activation_function": ACTIVATIONS[config.activation],
            "n_positions": described.seq_len,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }

    def parse(self, values: Mapping[str, Any]) -> Described:
        known_activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
        known = {
            "activation_function": known_activations,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        }
        require_known(values, known)
        return Described(
            config=DecoderConfig(
                d_model=values["n_embd"],
                num_layers=values["n_layer"],
                num_heads=values["n_head"],
                d_ff=values.get("n_inner"),
                norm="layernorm",
                norm_eps=values.get("layer_norm_epsilon", 1e-5),
                activation=known_activations[values.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
                tie_embeddings=values.get("tie_word_embeddings", True),
                position="learned",
            ),
            vocab_size=values["vocab_size"],
            seq_len=values.get("n_positions", 1024),
        )

    def places(self, config: DecoderConfig) -> dict[str, Place]:
        maps, norms = {}, {"norm.weight": Place(("transformer.ln_f.weight",))}
        for layer in range(config.num_layers):
            ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
            for name, place in (
                ("attention.qkv", "attn.c_attn"),
                ("attention.output", "attn.c_proj"),
                ("feed_forward.up", "mlp.c_fc"),
                ("feed_forward.down", "mlp.c_proj"),
            ):
                maps[f"{ours}.{name}.weight"] = Place((f"{theirs}.{place}.weight",), transposed=True)
            norms[f"{ours}.attention_norm.weight"] = Place((f"{theirs}.ln_1.weight",))
            norms[f"{ours}.feed_forward_norm.weight"] = Place((f"{theirs}.ln_2.weight",))
        tables = {
            "embedding.weight": Place(("transformer.wte.weight",)),
            "position.weight": Place(("transformer.wpe.weight",)),
        }
        head = {} if config.tie_embeddings else {"head.weight": Place(("lm_head.weight",))}
        return tables | biased(maps | norms) | head
