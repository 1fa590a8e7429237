"""Settings of the architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmtrain.config.schema.rules import REQUIRED, require, require_positive


@dataclass(kw_only=True)
class ModelConfig:
    """Base of every architecture."""


@dataclass(kw_only=True)
class TransformerConfig(ModelConfig):
    """What all architectures have in common: pre-normalisation, and a vocabulary that comes from the tokenizer."""

    d_model: int = REQUIRED  # width of the residual stream
    num_heads: int = REQUIRED  # query heads
    num_kv_heads: int | None = None  # key and value heads; None: as many as num_heads
    d_ff: int | None = None  # hidden width of the feed-forward; None: 4 d_model, gated 8/3 d_model (to 64s)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # normalisation before each sublayer and at the end
    norm_eps: float = 1e-6  # added to the variance
    bias: bool = False  # whether the linear maps of the blocks, and LayerNorms, add one
    position: Literal["rotary", "learned", "sinusoidal", "none"] = "rotary"  # how tokens know where they are
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: Literal["none", "linear", "ntk"] = "none"  # how rotary positions are stretched over longer contexts
    rope_factor: float = 1.0  # ... by how much
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] = "swiglu"  # of the feed-forward
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    tie_embeddings: bool = True  # one matrix for input and output embedding
    logit_softcap: float | None = None  # logits are kept below it, smoothly; None: as they are
    attention: Literal["auto", "sdpa", "flex", "naive"] = "auto"  # which implementation; they agree but for rounding
    init_std: float = 0.02  # standard deviation of every matrix at the start
    output_init: Literal["depth_scaled", "zero"] = "depth_scaled"  # matrices that write to the residual stream

    def __post_init__(self) -> None:
        require_positive(
            "model.",
            d_model=self.d_model,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            d_ff=self.d_ff,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rope_factor=self.rope_factor,
            logit_softcap=self.logit_softcap,
            init_std=self.init_std,
        )
        require(
            self.d_model % self.num_heads == 0,
            f"model.d_model ({self.d_model}) must be divisible by model.num_heads ({self.num_heads})",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads ({self.num_heads}) must be divisible by model.num_kv_heads ({self.kv_heads})",
        )
        self._require_positions()

    def _require_positions(self) -> None:
        require(
            self.position != "rotary" or self.head_dim % 2 == 0,
            f"model.position=rotary needs an even head width, got d_model / num_heads = {self.head_dim}",
        )
        require(
            self.position != "sinusoidal" or self.d_model % 2 == 0,
            f"model.position=sinusoidal needs an even model.d_model, got {self.d_model}",
        )
        scaled = self.rope_scaling != "none"
        require(
            not scaled or self.position == "rotary",
            f"model.rope_scaling={self.rope_scaling} is for model.position=rotary, got {self.position}",
        )
        require(
            scaled or self.rope_factor == 1,
            f"model.rope_factor={self.rope_factor} needs model.rope_scaling=linear or ntk",
        )
        require(
            not scaled or self.rope_factor > 1,
            f"model.rope_scaling={self.rope_scaling} needs model.rope_factor above 1, got {self.rope_factor}",
        )
        require(
            self.rope_scaling != "ntk" or self.head_dim > 2,
            f"model.rope_scaling=ntk needs heads wider than 2, got d_model / num_heads = {self.head_dim}",
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies.

        NTK-aware scaling (known as that since a post by bloc97, 2023; Peng et al., arXiv:2309.00071, section 3.1)
        raises it so far that the slowest pair of channels turns `rope_factor` times slower, and the fastest as before.
        """
        if self.rope_scaling != "ntk":
            return self.rope_theta
        return float(self.rope_theta * self.rope_factor ** (self.head_dim / (self.head_dim - 2)))

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies two projections."""
        return self.activation in ("swiglu", "geglu")

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward; the default keeps gated and plain ones about equally large."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 64) * 64 if self.gated else 4 * self.d_model


@dataclass(kw_only=True)
class DecoderConfig(TransformerConfig):
    """A decoder-only transformer: each token is predicted from those before it."""

    num_layers: int = REQUIRED  # number of blocks
    sliding_window: int | None = None  # tokens each one sees, itself included; None: all before it

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("model.", num_layers=self.num_layers, sliding_window=self.sliding_window)


@dataclass(kw_only=True)
class EncoderDecoderConfig(TransformerConfig):
    """An encoder that reads a source and a decoder that says its target, with one token embedding for both.

    Heads, feed-forward and positions are alike in both; positions of attention to the source are not rotated.
    """

    num_encoder_layers: int = REQUIRED  # blocks of the encoder
    num_decoder_layers: int = REQUIRED  # ... and of the decoder

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            "model.", num_encoder_layers=self.num_encoder_layers, num_decoder_layers=self.num_decoder_layers
        )


@dataclass(kw_only=True)
class AutoModelConfig(ModelConfig):
    """The largest preset whose training fits into memory; the run's own `config.yaml` names the shape it came to."""

    memory_share: float = 0.8  # of the memory of device and machine, that training may need

    def __post_init__(self) -> None:
        require(
            0 < self.memory_share <= 1, f"model.memory_share must be above 0 and at most 1, got {self.memory_share}"
        )
