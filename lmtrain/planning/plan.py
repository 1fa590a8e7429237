"""What a run will take, worked out from its settings: size, arithmetic and memory. Trains nothing, builds no model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lmtrain.config.schema import ExperimentConfig, TransformerConfig
from lmtrain.data.encoding import has_prompts
from lmtrain.data.evaluation import EVAL_BATCH_SEQUENCES
from lmtrain.data.prepare import find_prepared, was_prepared
from lmtrain.data.prepared import PreparedData
from lmtrain.data.ramps import BatchSizes, Ramp
from lmtrain.data.vocabulary import USUAL_CHARACTERS, vocabulary_size
from lmtrain.errors import ConfigError
from lmtrain.feeding import count_steps, train_batches, val_batches
from lmtrain.fitting import settle_model, training_memory
from lmtrain.hardware import available_memory, choose_device, require_format, total_memory
from lmtrain.model.sizing import ParameterCount, flops_per_token
from lmtrain.training.footprint import Footprint, TrainingMemory


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a run is to be. What is None is not known before the text is prepared."""

    steps: int | None
    tokens: int | None  # that are targets
    sequences: int | None
    evaluated_sequences: int | None  # of one evaluation
    evaluations: int = 0
    checkpoints: int = 0  # if every evaluation is the best so far, each of which is kept


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before it is made."""

    config: ExperimentConfig
    model: TransformerConfig  # of the config, or the one that `model=auto` comes to
    model_choice: str  # why; empty if it was named
    vocab_size: int
    vocab_assumed: bool  # as the text that it follows from was never prepared
    device: torch.device
    budget: Budget
    flops_per_token: float
    memory: TrainingMemory
    room: float  # bytes of the device's memory that training may take
    data: PreparedData | None  # if something follows from it, and it was prepared
    devices: int = 1  # that the batch is divided among

    @property
    def parameters(self) -> ParameterCount:
        return self.memory.parameters

    @property
    def flops(self) -> float | None:
        """Of the whole budget."""
        return None if self.budget.tokens is None else self.flops_per_token * self.budget.tokens

    @property
    def share(self) -> int:
        """Sequences of a batch that each device trains on."""
        return math.ceil(self.config.batch_size / self.devices)

    @property
    def exchanged(self) -> int:
        """Bytes that each device sends to the others in a step."""
        return self.memory.exchanged_bytes(math.ceil(self.share / max(1, self.micro_batch_size)))

    @property
    def largest_micro_batch_size(self) -> int:
        """Sequences that can go through the model at a time; 0: not even one."""
        return self.memory.largest_micro_batch(self.room)

    @property
    def micro_batch_size(self) -> int:
        """What the run will take: what it is told, or the batch or its half, quarter …; 0: not even one fits."""
        told = self.config.trainer.micro_batch_size
        return self.memory.chosen_micro_batch(self.room, self.share) if told == "auto" else told

    @property
    def footprint(self) -> Footprint:
        """Of a step with that microbatch; with one sequence if not even that fits."""
        return self.memory.footprint(max(1, self.micro_batch_size), self.share)

    @property
    def fits(self) -> bool:
        return self.footprint.peak <= self.room


def make_plan(config: ExperimentConfig, devices: int = 1) -> Plan:
    """The plan of a run on this machine, or on so many devices like the one here.

    Looks for prepared data where something follows from the text alone: the vocabulary of characters, the length of an
    epoch, how full padded rows are. Raises UsageError for a request that the run would refuse as well.
    """
    if devices > 1 and config.parallel.strategy == "single":
        raise ConfigError(f"{devices} devices make one run with parallel=ddp or parallel=fsdp, not parallel=single")
    device = choose_device(config.device)
    require_format(config.precision.format, device)
    known = vocabulary_size(config.tokenizer, config.data)
    data = None
    evaluates_all = config.trainer.eval_batches is None
    if (known is None or evaluates_all or _follows_from_text(config)) and was_prepared(config.data, config.tokenizer):
        data = find_prepared(config.data, config.tokenizer)
    vocab_size = data.tokenizer.vocab_size if data is not None else known or USUAL_CHARACTERS
    settled, choice = settle_model(config, vocab_size=vocab_size, device=device)
    model = settled.model
    assert isinstance(model, TransformerConfig)
    return Plan(
        config=settled,
        model=model,
        model_choice=choice,
        vocab_size=vocab_size,
        vocab_assumed=known is None and data is None,
        device=device,
        budget=plan_budget(settled, data),
        flops_per_token=flops_per_token(model, vocab_size, config.data.seq_len),
        memory=training_memory(settled, model, vocab_size=vocab_size, device=device, processes=devices),
        room=available_memory() / devices if device.type == "cpu" else total_memory(device),
        data=data,
        devices=devices,
    )


def plan_budget(config: ExperimentConfig, data: PreparedData | None) -> Budget:
    """The budget of a run; without data, as far as it follows from the settings."""
    trainer = config.trainer
    evaluated = None if trainer.eval_batches is None else trainer.eval_batches * EVAL_BATCH_SEQUENCES
    if data is not None:
        batches = train_batches(config, data)
        steps = count_steps(config, batches)
        sequences = batches.sequences(steps - 1).stop
        tokens, evaluated = int(sequences * batches.mean_targets), val_batches(config, data).num_sequences
    elif _follows_from_text(config):
        return Budget(steps=trainer.max_steps, tokens=trainer.max_tokens, sequences=None, evaluated_sequences=evaluated)
    else:
        ramp = trainer.batch_size_warmup_steps
        sizes = BatchSizes(
            config.batch_size, None if ramp is None else Ramp(initial=trainer.initial_batch_size, steps=ramp)
        )
        steps = trainer.max_steps or sizes.steps_for(math.ceil((trainer.max_tokens or 0) / config.data.seq_len))
        sequences = sizes.before(steps)
        tokens = sequences * config.data.seq_len
    evaluations = _evaluations(config, steps, tokens)
    saved_by_the_step = 0 if trainer.checkpoint_every is None else steps // trainer.checkpoint_every
    return Budget(
        steps=steps,
        tokens=tokens,
        sequences=sequences,
        evaluated_sequences=evaluated,
        evaluations=evaluations,
        checkpoints=evaluations + saved_by_the_step,
    )


def _evaluations(config: ExperimentConfig, steps: int, tokens: int) -> int:
    """How many there are, the one at the end included."""
    every, every_tokens = config.trainer.eval_every, config.trainer.eval_every_tokens
    if every is not None:
        return -(-steps // every)
    assert every_tokens is not None
    return min(steps, -(-tokens // every_tokens))


def _follows_from_text(config: ExperimentConfig) -> bool:
    """Whether the length of the run does: of an epoch, or of rows that are not full of targets."""
    return config.trainer.max_epochs is not None or config.data.batches == "padded" or has_prompts(config.data)
