"""Settings → a new model and the step that trains it: built, given a number format, divided among processes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lmtrain.compiling import compile_if_asked
from lmtrain.config.schema import ExperimentConfig, TransformerConfig
from lmtrain.data.batches import Batch
from lmtrain.distributed.strategy import DividedModel, replicate, shard, whole
from lmtrain.distributed.team import ALONE, Team
from lmtrain.errors import HardwareError
from lmtrain.fitting import training_memory
from lmtrain.hardware import choose_format, pads_vocab
from lmtrain.model.building import Model, build_model
from lmtrain.training.activation_checkpointing import checkpoint_activations
from lmtrain.training.fp8 import train_in_fp8
from lmtrain.training.losses import TrainingLoss
from lmtrain.training.memory import out_of_memory_recognized
from lmtrain.training.optimizers import build_optimizers
from lmtrain.training.precision import Precision, bf16_speedup
from lmtrain.training.step import TrainingStep


def build_step(
    config: ExperimentConfig,
    largest: Batch,
    vocab_size: int,
    device: torch.device,
    team: Team = ALONE,
    *,
    begin: Callable[[Model], None] | None = None,
) -> tuple[Model, TrainingStep]:
    """A new model and the step that trains it.

    Args:
        largest: a batch as large as any of the run.
        begin: gives the model other weights than random ones.

    Raises UsageError if the model does not fit into memory, or cannot be trained so.
    """
    with team.agreeing():
        try:
            model = _build_model(config, vocab_size, device, begin)
            precision = _choose_precision(config, model, largest, device)
        except torch.OutOfMemoryError as error:
            raise HardwareError(
                f"the model does not fit into the memory of device={device.type}: take a smaller one, or another device"
            ) from error
    precision = team.from_leader(precision)
    precision.set_tf32(config.precision.tf32)
    model.pad_vocab = pads_vocab(config.trainer.pad_vocab, device, precision.format)
    division = _divide(config, model, precision, team)
    memory = training_memory(config, model.config, vocab_size=vocab_size, device=device)
    step = TrainingStep(
        model,
        build_optimizers(config.optimizer, model.parameters(), model.block_matrices(), config.lr),
        precision,
        grad_clip=config.trainer.grad_clip,
        micro_batch_size=None if config.trainer.micro_batch_size == "auto" else config.trainer.micro_batch_size,
        loss=TrainingLoss(
            label_smoothing=config.trainer.label_smoothing, z_loss=config.trainer.z_loss, positions=memory.positions
        ),
        forward=division.forward,
        pass_by=division.pass_by,
        team=team,
    )
    compile_if_asked(config, step)
    return model, step


@out_of_memory_recognized()
def _build_model(
    config: ExperimentConfig, vocab_size: int, device: torch.device, begin: Callable[[Model], None] | None
) -> Model:
    assert isinstance(config.model, TransformerConfig)
    if config.model.attention == "flex" and device.type != "cuda":
        raise HardwareError(f"model.attention=flex can only be trained on CUDA, this run is on {device.type}; use auto")
    model = build_model(config.model, vocab_size=vocab_size, seq_len=config.data.seq_len, dropout=config.dropout)
    if config.parallel.strategy != "fsdp":  # which moves each part to where it belongs
        model = model.to(device)
    if begin is not None:
        begin(model)
    if config.precision.format == "fp8":
        train_in_fp8(model.all_blocks())
    checkpoint_activations(model.all_blocks(), config.trainer.activation_checkpointing)
    return model


def _divide(config: ExperimentConfig, model: Model, precision: Precision, team: Team) -> DividedModel:
    match config.parallel.strategy:
        case "single":
            return whole(model)
        case "ddp":
            return replicate(model, team, precision.device)
        case "fsdp":
            return shard(
                model,
                team,
                precision.device,
                format=precision.format,
                reshard_after_forward=config.parallel.reshard_after_forward,
                cpu_offload=config.parallel.cpu_offload,
            )


@out_of_memory_recognized()
def _choose_precision(config: ExperimentConfig, model: Model, largest: Batch, device: torch.device) -> Precision:
    one_sequence = next(largest.split(1))
    format, reason = choose_format(config.precision.format, device, lambda: bf16_speedup(model, one_sequence))
    return Precision(device, format, reason, fp8=config.precision.format == "fp8")
