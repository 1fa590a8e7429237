"""The memory formulas against the bytes of real passes and of real optimizers, on a CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lmtrain.config.schema import (
    SCHEMAS,
    AdamWConfig,
    DecoderConfig,
    EncoderDecoderConfig,
    OptimizerConfig,
    SGDConfig,
    TransformerConfig,
)
from lmtrain.hardware import FORMATS
from lmtrain.model.building import build_model
from lmtrain.training import optimizer_memory
from lmtrain.training.activation_checkpointing import checkpoint_activations
from lmtrain.training.activations import Workload
from lmtrain.training.footprint import GAPS, PROGRAM_BYTES, Footprint, TrainingMemory
from lmtrain.training.losses import TrainingLoss
from lmtrain.training.memory import PeakMemory
from lmtrain.training.optimizers import build_optimizers
from lmtrain.training.precision import Precision

OTHERS = ("weights", "optimizer state", "checkpoint copy", "allocator's gaps", "program")


def measured_peak(work: Workload, size: int, *, accumulated: bool) -> int:
    """Bytes that forward and backward of `size` sequences take at the most, gradients included."""
    torch.manual_seed(0)
    model = build_model(work.model, vocab_size=work.vocab_size, seq_len=work.seq_len, dropout=work.dropout)
    model.pad_vocab = work.pad_vocab
    checkpoint_activations(model.all_blocks(), work.checkpointing)
    tokens = torch.zeros(size, work.seq_len, dtype=torch.int64)
    context = {}
    if work.separate_documents:
        context["documents_BT"] = tokens.clone()
    if isinstance(work.model, EncoderDecoderConfig):
        context = {"sources_BS": tokens.clone(), "source_mask_BS": torch.ones_like(tokens, dtype=torch.bool)}
    if accumulated:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    loss = TrainingLoss(z_loss=0.0 if work.plain_loss else 1e-4)
    with PeakMemory([*model.parameters(), *model.buffers(), *gradients, tokens, *context.values()]) as memory:
        with Precision(torch.device("cpu"), FORMATS[work.format]).autocast():
            objective, _ = loss(model(tokens, **context), tokens)
        objective.backward()
    return int(memory.peak) + sum(gradient.nbytes for gradient in gradients)


def predicted_peak(work: Workload, size: int, *, accumulated: bool) -> int:
    """The same by formula: what comes and goes in the passes."""
    memory = TrainingMemory(work=work, optimizer=SGDConfig(momentum=0.0))
    moments = memory.footprint(size, 2 * size if accumulated else size).moments
    return max(
        sum(size for part, size in parts.items() if part not in OTHERS)
        for name, parts in moments.items()
        if name != "update"
    )


NANO = DecoderConfig(d_model=128, num_layers=4, num_heads=4, activation="relu2", qk_norm=True)
LLAMA = DecoderConfig(d_model=96, num_layers=6, num_heads=6, num_kv_heads=2, d_ff=256)
GPT = DecoderConfig(
    d_model=96, num_layers=6, num_heads=6, norm="layernorm", bias=True, position="learned", activation="gelu_tanh"
)
PAIRS = EncoderDecoderConfig(d_model=64, num_heads=4, num_encoder_layers=3, num_decoder_layers=3)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(("format", "dropout"), [("fp32", 0.0), ("fp32", 0.1), ("bf16", 0.0)])
@pytest.mark.parametrize(
    ("model", "vocab_size", "seq_len", "size", "accumulated"),
    [
        (NANO, 2048, 128, 4, False),
        (LLAMA, 1000, 256, 2, True),
        (LLAMA, 8000, 64, 2, False),
        (GPT, 257, 256, 4, False),
        (PAIRS, 2000, 64, 4, False),
    ],
)
def test_the_peak_of_a_step_is_predicted(
    model: TransformerConfig,
    vocab_size: int,
    seq_len: int,
    size: int,
    accumulated: bool,
    format: Any,
    dropout: float,
    checkpointing: Any,
) -> None:
    """Within a tenth, and never too low by more than what is not counted: rotary tables, targets, small change."""
    work = Workload(
        model=model,
        vocab_size=vocab_size,
        seq_len=seq_len,
        format=format,
        device="cpu",
        dropout=dropout,
        checkpointing=checkpointing,
    )
    measured = measured_peak(work, size, accumulated=accumulated)
    predicted = predicted_peak(work, size, accumulated=accumulated)
    assert 0.995 * measured <= predicted <= 1.10 * measured, f"{predicted / measured - 1:+.1%}"


def any_workload(seed: int) -> Workload:
    """Settings of all kinds, drawn at random."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4])
    shape: dict[str, Any] = {
        "d_model": heads * draw.choice([16, 32]),
        "num_heads": heads,
        "num_kv_heads": draw.choice([None, 1]),
        "norm": draw.choice(["rmsnorm", "layernorm"]),
        "bias": draw.random() < 0.5,
        "position": draw.choice(["rotary", "learned", "sinusoidal", "none"]),
        "activation": draw.choice(["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"]),
        "qk_norm": draw.random() < 0.5,
        "tie_embeddings": draw.random() < 0.5,
        "logit_softcap": draw.choice([None, 30.0]),
        "attention": draw.choice(["auto", "auto", "naive"]),
    }
    pairs = draw.random() < 0.3
    model: TransformerConfig
    if pairs:
        model = EncoderDecoderConfig(**shape, num_encoder_layers=3, num_decoder_layers=2)
    else:
        model = DecoderConfig(**shape, num_layers=5, sliding_window=draw.choice([None, 16]))
    return Workload(
        model=model,
        vocab_size=draw.choice([257, 2000]),
        seq_len=draw.choice([64, 128]),
        format=draw.choice(["fp32", "bf16"]),
        device="cpu",
        dropout=draw.choice([0.0, 0.1]),
        checkpointing=draw.choice(["none", "selective", "full"]),
        separate_documents=not pairs and draw.random() < 0.3,
        plain_loss=draw.random() < 0.7,
        pad_vocab=draw.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(40))
def test_no_combination_of_settings_is_far_off(seed: int) -> None:
    """Small shapes, where weights and activations of single blocks weigh more than in any model of use."""
    work, accumulated = any_workload(seed), seed % 2 == 1
    measured = measured_peak(work, 4, accumulated=accumulated)
    predicted = predicted_peak(work, 4, accumulated=accumulated)
    assert 0.98 * measured <= predicted <= 1.25 * measured, f"{predicted / measured - 1:+.1%} of {work}"


@pytest.mark.parametrize("seed", range(12))
def test_one_more_sequence_takes_no_more_than_is_said(seed: int) -> None:
    work = any_workload(seed)
    growth = measured_peak(work, 3, accumulated=True) - measured_peak(work, 2, accumulated=True)
    assert 0.98 * growth <= TrainingMemory(work=work, optimizer=AdamWConfig()).sequence_bytes <= 1.5 * growth


def memory_of(
    optimizer: OptimizerConfig, model: TransformerConfig = LLAMA, *, device: Any = "cpu", **settings: Any
) -> TrainingMemory:
    work = Workload(model=model, vocab_size=300, seq_len=32, format="fp32", device=device, **settings)
    return TrainingMemory(work=work, optimizer=optimizer)


@pytest.mark.parametrize("bound", [optimizer_memory.MAX_STACK_BYTES, 100_000, 0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", SCHEMAS["optimizer"].values())
def test_optimizer_state_and_its_working_memory_are_those_of_the_optimizer(
    config: type[OptimizerConfig], tied: bool, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_memory, "MAX_STACK_BYTES", bound)
    shape = DecoderConfig(
        d_model=64, num_layers=2, num_heads=4, bias=True, norm="layernorm", position="learned", tie_embeddings=tied
    )
    memory = memory_of(config(), shape)
    model = build_model(shape, vocab_size=300, seq_len=32, dropout=0.0)
    optimizers = build_optimizers(config(), model.parameters(), model.block_matrices(), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    for optimizer in optimizers:
        optimizer.step()
    state = [
        value
        for optimizer in optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
    assert memory.state_bytes == sum(value.nbytes for value in state if value.numel() > 1)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with PeakMemory([*model.parameters(), *gradients, *state]) as working:
        for optimizer in optimizers:
            optimizer.step()
    moment = memory.footprint(1, 1).moments["update"]
    assert working.peak <= moment["working memory"] <= 1.4 * working.peak + 4096
    assert moment["gradients"] == sum(gradient.nbytes for gradient in gradients)
    assert moment["weights"] == sum(parameter.nbytes for parameter in model.parameters())


def test_sgd_without_momentum_keeps_nothing() -> None:
    assert memory_of(SGDConfig(momentum=0.0)).state_bytes == 0


def test_parts_add_up_to_the_fullest_moment() -> None:
    footprint = Footprint(
        moments={"loss": {"weights": 10, "activations": 7}, "update": {"weights": 10, "gradients": 5}}
    )
    assert (footprint.fullest, footprint.peak) == ("loss", 17)
    assert [footprint.largest(part) for part in ("weights", "gradients", "activations", "program")] == [10, 5, 7, 0]


def test_checkpoints_take_main_memory_of_a_cpu_and_none_of_a_gpu() -> None:
    on_cpu, on_gpu = (memory_of(AdamWConfig(), device=device).footprint(1, 1) for device in ("cpu", "cuda"))
    assert on_cpu.largest("checkpoint copy") == 3 * on_cpu.largest("weights")
    assert on_gpu.largest("checkpoint copy") == 0
    assert on_gpu.largest("program") == PROGRAM_BYTES["cuda"]
    tensors = on_gpu.peak - on_gpu.largest("program")
    assert on_gpu.largest("allocator's gaps") == pytest.approx(tensors * GAPS["cuda"] / (1 + GAPS["cuda"]), rel=1e-3)


def test_a_gpu_keeps_no_probabilities_and_masks_only_where_flex_attention_does_not_help() -> None:
    def activations(**settings: Any) -> int:
        return memory_of(AdamWConfig(), device="cuda", **settings).footprint(1, 1).largest("activations")

    assert activations(dropout=0.1) < 1.1 * activations()
    assert activations(separate_documents=True) == activations()
    assert activations(separate_documents=True, dropout=0.1) > activations(dropout=0.1)


def test_the_largest_microbatch_is_the_last_that_fits() -> None:
    memory = memory_of(AdamWConfig())
    room = memory.footprint(7, 8).peak
    assert memory.largest_micro_batch(room) == 7
    assert memory.largest_micro_batch(room - 1) == 6
    assert memory.largest_micro_batch(memory.footprint(1, 2).peak - 1) == 0


def test_auto_comes_to_the_batch_or_its_half_until_it_fits() -> None:
    memory = memory_of(AdamWConfig())
    assert memory.chosen_micro_batch(memory.footprint(12, 12).peak, 12) == 12
    assert memory.chosen_micro_batch(memory.footprint(12, 12).peak - 1, 12) == 6
    assert memory.chosen_micro_batch(memory.footprint(3, 12).peak, 12) == 3
    assert memory.chosen_micro_batch(memory.footprint(3, 12).peak - 1, 12) == 2  # a half is rounded up
    assert memory.chosen_micro_batch(1, 12) == 0
