"""Everything one run trains with, built from its settings and its prepared data. Writes nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain.config.presets import preset_of
from lmtrain.config.schema import EncoderDecoderConfig, ExperimentConfig, TransformerConfig
from lmtrain.data.batches import Batch, EvalBatches, Source, TrainBatches
from lmtrain.data.evaluation import eval_batches
from lmtrain.data.packed import PackedBatches
from lmtrain.data.padded import PaddedBatches
from lmtrain.data.prefetch import Prefetched
from lmtrain.data.prepared import SPLIT_WORDS, PreparedData, SplitName
from lmtrain.data.ramps import Ramp
from lmtrain.data.sequence_to_sequence import document_rows
from lmtrain.data.tokenizer import load_tokenizer
from lmtrain.errors import HardwareError, RunFolderError
from lmtrain.fitting import settle_model, training_memory
from lmtrain.hardware import available_memory, choose_format
from lmtrain.initial_weights import load_initial_weights
from lmtrain.model.building import Model, build_model
from lmtrain.model.sizing import flops_per_token
from lmtrain.run_dir import RunDir
from lmtrain.training.activation_checkpointing import checkpoint_activations
from lmtrain.training.checkpoint import CheckpointFolder, CheckpointWriter, capture, restore
from lmtrain.training.diagnostics import Diagnostics
from lmtrain.training.evaluation import evaluate
from lmtrain.training.losses import TrainingLoss
from lmtrain.training.memory import out_of_memory_recognized
from lmtrain.training.optimizers import build_optimizers
from lmtrain.training.precision import Precision, bf16_speedup
from lmtrain.training.profiling import StepProfiler
from lmtrain.training.schedules import warmup_length
from lmtrain.training.step import TrainingStep
from lmtrain.training.trainer import Judge, Progress, Trainer
from lmtrain.training.utilisation import Utilisation, measured_peak, peak_flops

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """The parts of a run, ready to train."""

    config: ExperimentConfig  # with the device, the model and the number format that `auto` stood for
    model: Model
    forward: Callable[..., Tensor]  # the model, compiled if asked for
    step: TrainingStep
    batches: TrainBatches
    val_batches: EvalBatches
    val_bytes_per_token: float
    data_fingerprint: str
    tokenizer_fingerprint: str
    total_steps: int
    model_choice: str  # why `model=auto` is this model; empty if it was named

    @property
    def precision(self) -> Precision:
        return self.step.precision

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def tags(self) -> dict[str, str]:
        """What trackers are told of what `auto` came to."""
        preset = preset_of(self.config.model)
        return {"device": str(self.precision.device)} | ({"preset": preset} if preset else {})

    def restore(self, checkpoints: Path) -> Progress:
        """Continue from the newest sound checkpoint: model, optimizers, random states and the microbatch are put back.

        Raises UsageError if it is of another model or tokenizer, or of other text (unless `force`).
        """
        self._require_tokenizer(RunDir(checkpoints.parent))
        folder = CheckpointFolder(checkpoints)
        checkpoint = folder.load_newest()
        if checkpoint.meta["data_fingerprint"] != self.data_fingerprint and not self.config.force:
            raise RunFolderError(
                "the text is not the one this run was trained on: its continuation would be another run; "
                "put the text back, or add force=true to go on all the same"
            )
        restore(checkpoint, self.model, self.step.optimizers, self.step.scaler)
        microbatch = checkpoint.meta.get("micro_batch_size")  # absent from the first checkpoints of this format
        if microbatch is not None and microbatch["setting"] == self.config.trainer.micro_batch_size:
            self.step.micro_batch_size = microbatch["in_use"]
        progress = Progress(**checkpoint.meta["progress"])
        folder.link(step=progress.step, best_step=progress.best_step)
        return progress

    def _require_tokenizer(self, folder: RunDir) -> None:
        """Weights mean nothing with other ids: `force` does not help against another tokenizer."""
        if self.config.force and load_tokenizer(folder.tokenizer).fingerprint != self.tokenizer_fingerprint:
            raise RunFolderError(
                f"{folder} has another tokenizer than the one this text makes, so its weights mean nothing here; for a "
                f"new run from its weights: tokenizer=saved tokenizer.path={folder} init_from={folder}"
            )

    def find_micro_batch_size(self) -> None:
        """Settle how many sequences go through the model at a time. Raises torch.OutOfMemoryError if not one can."""
        room = available_memory() if self.precision.device.type == "cpu" else None
        needed = training_memory(
            self.config, self.model.config, vocab_size=self.model.vocab_size, device=self.precision.device
        )
        self.step.find_micro_batch_size(
            self.batches.largest,
            room=room,
            beside=needed.state_bytes + needed.checkpoint_bytes,
            bound=needed.sequence_bytes,
        )

    @out_of_memory_recognized()
    def evaluate(self) -> dict[str, float]:
        """The validation metrics as the model stands, by microbatches: what memory is short for is short here too."""
        return evaluate(
            self.model,
            self.val_batches,
            self.precision,
            bytes_per_token=self.val_bytes_per_token,
            forward=self.forward,
            micro_batch_size=self.step.micro_batch_size,
        )

    @property
    def settling_steps(self) -> int:
        """Steps until the learning rate and the batches have their full size; runs do not compare before."""
        trainer = self.config.trainer
        ramps = (trainer.batch_size_warmup_steps or 0, trainer.seq_len_warmup_steps or 0)
        return max(warmup_length(self.config.schedule, self.total_steps), *ramps)

    def trainer(
        self,
        folder: RunDir,
        record: Callable[[dict[str, float]], None],
        progress: Progress,
        judge: Judge | None = None,
    ) -> Trainer:
        """The loop over these parts, from `progress` on, with its checkpoints and histograms in `folder`."""
        trainer = self.config.trainer
        return Trainer(
            config=trainer,
            schedule=self.config.schedule,
            lr=self.config.lr,
            total_steps=self.total_steps,
            step=self.step,
            batches=Prefetched(
                self.batches, num_steps=self.total_steps, pin_memory=self.precision.device.type == "cuda"
            ),
            evaluate=self.evaluate,
            capture=lambda state: capture(
                self.model, self.step.optimizers, self.step.scaler, {"progress": state, **self._circumstances()}
            ),
            checkpoints=CheckpointWriter(CheckpointFolder(folder.checkpoints, keep=trainer.keep_checkpoints)),
            objective=self.config.objectives[0],
            record=record,
            progress=progress,
            prepare=self.find_micro_batch_size,
            run_name=str(folder),
            judge=judge,
            warmup_steps=self.settling_steps,
            diagnostics=Diagnostics(self.model, histograms=folder.histograms)
            if self.config.trainer.diagnostics
            else None,
            utilisation=self._utilisation(),
            profiler=StepProfiler(
                folder.profile, self.precision.device, first=progress.step, total_steps=self.total_steps
            )
            if trainer.profile
            else None,
        )

    def _circumstances(self) -> dict[str, Any]:
        """What a checkpoint must know to be continued to the bit, besides what is trained."""
        # The microbatch decides how sums are rounded.
        microbatch = {"setting": self.config.trainer.micro_batch_size, "in_use": self.step.micro_batch_size}
        return {"data_fingerprint": self.data_fingerprint, "micro_batch_size": microbatch}

    def _utilisation(self) -> Utilisation:
        device, format = self.precision.device, self.precision.format
        peak = peak_flops(device, format)
        if peak is None and self.config.trainer.diagnostics:
            peak = measured_peak(device, format, torch.get_num_threads())
        tokens = flops_per_token(self.model.config, self.model.vocab_size, self.config.data.seq_len)
        return Utilisation(device, flops_per_token=tokens, peak_flops=peak)


def build_session(config: ExperimentConfig, data: PreparedData, device: torch.device) -> Session:
    """Build model, optimizers and batches. Raises UsageError if they do not fit together, or into memory."""
    config, model_choice = settle_model(config, vocab_size=data.tokenizer.vocab_size, device=device)
    batches = train_batches(config, data)
    if batches.note:
        log.info(batches.note)
    total_steps = count_steps(config, batches)
    warmup_length(config.schedule, total_steps)  # refused here if it is too long
    torch.manual_seed(config.seed)
    try:
        model = _build_model(config, data, device)
        precision = _choose_precision(config, model, batches.largest, device)
    except torch.OutOfMemoryError as error:
        raise HardwareError(
            f"the model does not fit into the memory of device={device.type}: take a smaller one, or another device"
        ) from error
    forward: Callable[..., Tensor] = torch.compile(model) if config.trainer.compile else model
    step = TrainingStep(
        model,
        build_optimizers(config.optimizer, model.parameters(), model.block_matrices(), config.lr),
        precision,
        grad_clip=config.trainer.grad_clip,
        micro_batch_size=None if config.trainer.micro_batch_size == "auto" else config.trainer.micro_batch_size,
        loss=TrainingLoss(label_smoothing=config.trainer.label_smoothing, z_loss=config.trainer.z_loss),
        forward=forward,
    )
    return Session(
        config=replace(
            config,
            device=device.type,  # type: ignore[arg-type]  # one of those there are to choose from
            precision=replace(config.precision, format=precision.name),
        ),
        model=model,
        forward=forward,
        step=step,
        batches=batches,
        val_batches=_val_batches(config, data),
        val_bytes_per_token=data.bytes_per_target("val"),
        data_fingerprint=data.fingerprint,
        tokenizer_fingerprint=data.tokenizer.fingerprint,
        total_steps=total_steps,
        model_choice=model_choice,
    )


@out_of_memory_recognized()
def _build_model(config: ExperimentConfig, data: PreparedData, device: torch.device) -> Model:
    assert isinstance(config.model, TransformerConfig)
    if config.model.attention == "flex" and device.type != "cuda":
        raise HardwareError(f"model.attention=flex can only be trained on CUDA, this run is on {device.type}; use auto")
    model = build_model(
        config.model,
        vocab_size=data.tokenizer.vocab_size,
        seq_len=config.data.seq_len,
        dropout=config.dropout,
    ).to(device)
    if config.init_from is not None:
        load_initial_weights(model, config, data)
    checkpoint_activations(model.all_blocks(), config.trainer.activation_checkpointing)
    return model


@out_of_memory_recognized()
def _choose_precision(config: ExperimentConfig, model: Model, largest: Batch, device: torch.device) -> Precision:
    one_sequence = next(largest.split(1))
    format, reason = choose_format(config.precision.format, device, lambda: bf16_speedup(model, one_sequence))
    return Precision(device, format, reason)


def train_batches(config: ExperimentConfig, data: PreparedData) -> TrainBatches:
    """What the steps of a run train on. Raises DataError if the text is too short for a sequence."""

    def ramp(initial: int, steps: int | None) -> Ramp | None:
        return None if steps is None else Ramp(initial=initial, steps=steps)

    sources, trainer = _sources(data, "train"), config.trainer
    if config.data.batches == "padded":
        return PaddedBatches(
            document_rows(
                sources,
                seq_len=config.data.seq_len,
                split=SPLIT_WORDS["train"],
                source_end_id=_source_end_id(config, data),
            ),
            [source.weight for source in sources],
            batch_size=config.batch_size,
            seed=config.seed,
        )
    return PackedBatches(
        sources,
        seq_len=config.data.seq_len,
        batch_size=config.batch_size,
        seed=config.seed,
        separate_documents=config.data.batches == "packed_documents",
        batch_size_ramp=ramp(trainer.initial_batch_size, trainer.batch_size_warmup_steps),
        seq_len_ramp=ramp(trainer.initial_seq_len, trainer.seq_len_warmup_steps),
    )


def _val_batches(config: ExperimentConfig, data: PreparedData) -> EvalBatches:
    return eval_batches(
        config.data,
        _sources(data, "val"),
        split=SPLIT_WORDS["val"],
        batch_size=config.batch_size,
        source_end_id=_source_end_id(config, data),
        num_batches=config.trainer.eval_batches,
    )


def _source_end_id(config: ExperimentConfig, data: PreparedData) -> int | None:
    """What the targets of an encoder-decoder begin after."""
    return data.tokenizer.end_id if isinstance(config.model, EncoderDecoderConfig) else None


def _sources(data: PreparedData, split: SplitName) -> list[Source]:
    """Named if there are several."""
    several = len(data.sources) > 1
    return [
        Source(source.splits[split].documents, source.weight, source.name if several else "")
        for source in data.sources
        if split in source.splits
    ]


def count_steps(config: ExperimentConfig, batches: TrainBatches) -> int:
    """Optimizer steps of the budget, whichever of the three gives it."""
    trainer = config.trainer
    if trainer.max_steps is not None:
        return trainer.max_steps
    if trainer.max_epochs is not None:
        return batches.steps_for(sequences=math.ceil(trainer.max_epochs * batches.epoch_size))
    assert trainer.max_tokens is not None
    return batches.steps_for(sequences=math.ceil(trainer.max_tokens / batches.mean_targets))
