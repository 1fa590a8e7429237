"""How many bytes the forward pass keeps for the backward pass, block by block, by formula: no tensors, no torch.

Counts what automatic differentiation keeps of the layers of `model/`, tensor by tensor as they are written there; a
change of those changes the counts, and tests hold them against the bytes of real passes. Weights, their gradients and
what an optimizer keeps are in `footprint.py`. Compiled models keep less.

Residual stream, normalisation and loss are in fp32; what matrix products take and give has the format's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig, TransformerConfig
from lmtrain.model.sizing import VOCAB_MULTIPLE

FP32 = 4
"""Bytes of a number in fp32."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the activations of a sequence depend on."""

    model: TransformerConfig
    vocab_size: int
    seq_len: int  # tokens of a row; of an encoder–decoder, those of a source and as many of its target
    format: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    dropout: float = 0.0
    checkpointing: Literal["none", "selective", "full"] = "none"
    separate_documents: bool = False  # tokens of a row see those of their own document only
    plain_loss: bool = True  # neither label smoothing nor a z-loss
    pad_vocab: bool = False  # logits are computed for a multiple of VOCAB_MULTIPLE tokens

    @property
    def mixed(self) -> bool:
        """Whether matrix products are in 16 bits."""
        return self.format != "fp32"

    @property
    def width(self) -> int:
        """Bytes of a number that a matrix product gives."""
        return 2 if self.mixed else FP32

    @property
    def output_rows(self) -> int:
        """Tokens that logits are computed for."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if self.pad_vocab else self.vocab_size

    @property
    def keeps_probabilities(self) -> bool:
        """Whether attention keeps its probabilities, where a fused kernel computes them again.

        PyTorch has no fused kernel with dropout for CPUs; of MPS nothing is taken for granted.
        """
        naive = self.model.attention == "naive"
        return naive or self.device == "mps" or (self.device == "cpu" and self.dropout > 0)

    @property
    def copies_heads(self) -> bool:
        """Whether attention copies all that it takes, so that it is not kept where its product has put it."""
        return self.keeps_probabilities and self.mixed

    @property
    def windowed(self) -> bool:
        """Whether a window hides some of the past."""
        window = self.model.sliding_window if isinstance(self.model, DecoderConfig) else None
        return window is not None and window < self.seq_len

    @property
    def reads_mask(self) -> bool:
        """Whether what is seen is a matrix, and not known to the kernel (`attend.chooses_flex`)."""
        flex = self.model.attention == "flex" or (
            self.model.attention == "auto" and self.device == "cuda" and self.dropout == 0
        )
        return (self.separate_documents or self.windowed) and not flex


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """Bytes of one block for one sequence."""

    held: int  # from its forward to its backward pass, its input included
    kept: int  # ... when its backward pass begins and all is there again that checkpointing had let go of
    working: int  # beside that, at the fullest moment of its backward pass
    making: int  # beside what is held, at the fullest moment of its forward pass


@dataclass(frozen=True, kw_only=True)
class SequenceMemory:
    """Bytes of one sequence, by when they are there."""

    blocks: tuple[BlockMemory, ...]  # those of an encoder first
    embedded: int  # before the blocks, to the end of the backward pass: dropout of the embedding, a mask
    last_norm: int  # after the last block of the decoder, or of an encoder, with its input
    loss_forward: int  # logits and what cross-entropy makes of them
    loss_backward: int  # ... when their gradient is computed
    logits_gradient: int  # as the last matrix product takes it


@dataclass(frozen=True, kw_only=True)
class _Sublayer:
    """Bytes that a sublayer keeps, its input in the residual stream not included."""

    kept: int
    products: int  # results of its matrix products, which selective checkpointing holds on to
    working: int  # beside what is kept, at the fullest moment of its own
    scores: bool = False  # whether that is also what its forward pass takes: scores on their way to probabilities
    of_source: int = 0  # made before the block is entered, so that checkpointing cannot let it go


def sequence_memory(work: Workload) -> SequenceMemory:
    """What forward and backward of one sequence take, but for weights and their gradients."""
    itself, source, feed_forward = _self_attention(work), _cross_attention(work), _feed_forward(work)
    plain = _block(work, [itself, feed_forward])
    match model := work.model:
        case DecoderConfig():
            stacks, blocks = 1, [plain] * model.num_layers
        case EncoderDecoderConfig():
            crossing = _block(work, [itself, source, feed_forward])
            stacks, blocks = 2, [plain] * model.num_encoder_layers + [crossing] * model.num_decoder_layers
        case _:
            raise TypeError(f"nothing is known of {type(model).__name__}")
    logits, product = work.seq_len * work.vocab_size, work.seq_len * work.output_rows
    capped = logits * work.width if model.logit_softcap is not None else 0
    # In 16 bits, or more than are asked for, it is there beside the copy of it in fp32.
    copied = product * work.width if work.mixed or (work.output_rows > work.vocab_size and not capped) else 0
    return SequenceMemory(
        blocks=tuple(blocks),
        embedded=stacks * _dropped(work, FP32) + _mask(work),
        last_norm=_residual(work) + _norm(work),
        loss_forward=capped + copied + logits * FP32 * (2 if work.plain_loss else 1),
        loss_backward=capped + logits * FP32 * (3 if work.plain_loss else 5),
        logits_gradient=capped + product * work.width,
    )


def shared_mask(work: Workload) -> int:
    """Bytes of a window's mask, which all sequences of a microbatch share, with its copies in numbers."""
    if not work.reads_mask or work.separate_documents:
        return 0
    copies = len(sequence_memory(work).blocks) if work.checkpointing == "none" else 1
    return work.seq_len**2 * (1 + copies * work.width)


def _block(work: Workload, sublayers: Sequence[_Sublayer]) -> BlockMemory:
    residual, selective = _residual(work), work.checkpointing == "selective"
    of_source = sum(sublayer.of_source for sublayer in sublayers)
    kept = of_source + sum(residual + sublayer.kept for sublayer in sublayers)
    products = sum(sublayer.products for sublayer in sublayers)
    held = {"none": kept, "selective": residual + products + of_source, "full": residual + of_source}
    # Computed again, or on the way back: what later sublayers keep is not there yet, or let go of.
    working, later = 0, 0
    for sublayer in reversed(sublayers):
        working = max(working, sublayer.working - later)
        later += sublayer.kept - (sublayer.products if selective else 0)
    # The gradient from above; and the last product, which nobody asks for again.
    working += residual + (residual // FP32 * work.width if selective else 0)
    making, earlier = 0, of_source
    for sublayer in sublayers:
        making = max(making, earlier + 2 * residual + sublayer.kept + (sublayer.working if sublayer.scores else 0))
        earlier += {"none": residual + sublayer.kept, "selective": sublayer.products, "full": 0}[work.checkpointing]
    return BlockMemory(
        held=held[work.checkpointing], kept=kept, working=working, making=making - held[work.checkpointing]
    )


def _self_attention(work: Workload) -> _Sublayer:
    queries, keys = _heads(work)
    made = (queries + 2 * keys) * work.width
    turned = (queries + keys) * work.width if work.model.position == "rotary" or work.model.qk_norm else 0
    kept = (0 if work.copies_heads else made) + (0 if work.keeps_probabilities else turned)
    attended, working = _attended(work)
    return _Sublayer(
        kept=_norm(work) + kept + _normalised_heads(work, queries + keys) + attended,
        products=made + queries * work.width,
        working=working,
        scores=work.keeps_probabilities,
    )


def _cross_attention(work: Workload) -> _Sublayer:
    queries, keys = _heads(work)
    normalised = work.width if work.model.qk_norm and not work.keeps_probabilities else 0
    of_source = (2 * keys * work.width) if not work.copies_heads or work.checkpointing != "none" else 0
    of_source += keys * normalised + _normalised_heads(work, keys)
    of_source += queries * work.width if work.mixed else 0  # the source, as wide as the queries, in 16 bits
    attended, working = _attended(work)
    return _Sublayer(
        kept=_norm(work)
        + (0 if work.copies_heads else queries * work.width)
        + queries * normalised
        + _normalised_heads(work, queries)
        + attended,
        products=2 * queries * work.width,
        working=working,
        scores=work.keeps_probabilities,
        of_source=of_source,
    )


def _heads(work: Workload) -> tuple[int, int]:
    """Numbers of the queries, and of the keys, which are as many as those of the values."""
    return work.seq_len * work.model.d_model, work.seq_len * work.model.kv_heads * work.model.head_dim


def _normalised_heads(work: Workload, numbers: int) -> int:
    """What `qk_norm` keeps besides its input: the roots; on CPUs a copy of what is in 16 bits, or what is rotated."""
    if not work.model.qk_norm:
        return 0
    copied = work.mixed or (work.device == "cpu" and work.model.position == "rotary")
    copy = FP32 * numbers if copied and work.device != "cuda" else 0
    return FP32 * numbers // work.model.head_dim + copy


def _attended(work: Workload) -> tuple[int, int]:
    """What attention keeps beside the queries, keys and values it is given, and its working memory."""
    queries, keys = _heads(work)
    result = queries * work.width + _dropped(work, work.width)
    if not work.keeps_probabilities:
        sums = FP32 * work.seq_len * work.model.num_heads  # the logarithm of each row's
        mask = work.seq_len**2 * work.width if work.reads_mask and work.separate_documents else 0  # as numbers to add
        return result + sums + mask, (4 * queries + 4 * keys) * work.width
    scores = FP32 * work.model.num_heads * work.seq_len**2
    # Copies of queries and keys, these for every query head. The values of a single sequence are not copied.
    copies = (3 if work.mixed or work.model.qk_norm else 2) * queries * FP32
    # Probabilities; what dropout multiplies them with, and their product.
    kept = scores * (3 if work.dropout else 1)
    if work.model.attention == "naive":
        kept += work.seq_len**2  # what is not seen, a byte each
        kept += (-scores // 2 if work.dropout else scores // 2) if work.mixed else 0  # the last of these in 16 bits
    working = scores + (2 * queries + keys) * work.width + 2 * queries * FP32 if work.mixed else scores + queries * FP32
    working += scores if work.mixed and work.model.attention == "naive" else 0
    return result + kept + copies, working


def _feed_forward(work: Workload) -> _Sublayer:
    model, width = work.model, work.width
    hidden, result = work.seq_len * model.hidden_dim * width, work.seq_len * model.d_model * width
    if model.gated:
        made, activated, working = 2 * hidden, 2 * hidden, 2 * hidden  # activated gate, and its product with the values
    elif model.activation == "relu2":
        # What is squared, and its square; on CUDA, autocast does that in fp32.
        wide = work.mixed and work.device == "cuda"
        made, activated, working = hidden, (5 if wide else 1) * hidden, (6 if wide else 3 if work.mixed else 2) * hidden
    else:
        made, activated, working = hidden, hidden, hidden
    return _Sublayer(
        kept=_norm(work) + made + activated + _dropped(work, width),
        products=made + result,
        working=working + (result if work.mixed else 0),
    )


def _residual(work: Workload) -> int:
    """The residual stream at one place."""
    return FP32 * work.seq_len * work.model.d_model


def _norm(work: Workload) -> int:
    """A normalisation and its result, as the product after it takes that."""
    width = work.model.d_model
    rms = work.model.norm == "rmsnorm"
    # Without a kernel of its own, RMSNorm is several operations, and the normalised input is kept before the gain; on a
    # CPU in place of the input (`model/fused.py`).
    composite = FP32 * width if rms and work.device == "mps" else 0
    return work.seq_len * (width * work.width + composite + (FP32 if rms else 2 * FP32))


def _dropped(work: Workload, width: int) -> int:
    """What dropout of the residual stream's width multiplies with: numbers like its input's; on CUDA, bytes."""
    if not work.dropout:
        return 0
    return work.seq_len * work.model.d_model * (1 if work.device == "cuda" else width)


def _mask(work: Workload) -> int:
    """Which tokens of a row see each other, a byte each."""
    return work.seq_len**2 if work.reads_mask and work.separate_documents else 0
