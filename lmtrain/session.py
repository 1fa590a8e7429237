"""Everything one run trains with, built from its settings and its prepared data. Writes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain.compiling import settle_compile
from lmtrain.config.presets import preset_of
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.batches import EvalBatches, TrainBatches
from lmtrain.data.prefetch import Prefetched
from lmtrain.data.prepared import PreparedData
from lmtrain.data.tokenizer import load_tokenizer
from lmtrain.distributed.sharding import DividedFiles
from lmtrain.distributed.team import ALONE, Team
from lmtrain.errors import HardwareError, RunFolderError
from lmtrain.feeding import OwnShare, count_steps, train_batches, val_batches
from lmtrain.fitting import settle_model, training_memory
from lmtrain.hardware import available_memory, total_memory
from lmtrain.initial_weights import load_initial_weights
from lmtrain.model.building import Model
from lmtrain.model.sizing import flops_per_token
from lmtrain.run_dir import RunDir
from lmtrain.step_building import build_step
from lmtrain.threads import settle_threads
from lmtrain.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    TensorFiles,
    WholeFiles,
    capture,
    divided_like,
    restore,
)
from lmtrain.training.checkpoint_writer import Checkpoints, CheckpointWriter, NoCheckpoints
from lmtrain.training.diagnostics import Diagnostics
from lmtrain.training.evaluation import evaluate
from lmtrain.training.memory import out_of_memory_recognized
from lmtrain.training.precision import Precision
from lmtrain.training.profiling import StepProfiler
from lmtrain.training.schedules import warmup_length
from lmtrain.training.step import TrainingStep
from lmtrain.training.trainer import Judge, Progress, Trainer
from lmtrain.training.utilisation import Utilisation, measured_peak, peak_flops

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Session:
    """The parts of a run, ready to train."""

    config: ExperimentConfig  # with the device, the model, the number format and the rest that `auto` stood for
    model: Model
    forward: Callable[..., Tensor]  # the model as it is called: divided among processes, if it is
    team: Team
    files: TensorFiles  # how checkpoints are written and read
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
        folder = CheckpointFolder(checkpoints, files=self.files)
        checkpoint = folder.load_newest()
        if checkpoint.meta["data_fingerprint"] != self.data_fingerprint and not self.config.force:
            raise RunFolderError(
                "the text is not the one this run was trained on: its continuation would be another run; "
                "put the text back, or add force=true to go on all the same"
            )
        restore(checkpoint, self.model, self.step.optimizers, self.step.scaler, self.team)
        microbatch = checkpoint.meta.get("micro_batch_size")  # absent from the first checkpoints of this format
        if microbatch is not None and microbatch["setting"] == self.config.trainer.micro_batch_size:
            self.step.micro_batch_size = microbatch["in_use"]
        progress = Progress(**checkpoint.meta["progress"])
        if self.team.leads:
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
        room = available_memory() / self.team.local_size if self.precision.device.type == "cpu" else None
        needed = training_memory(
            self.config,
            self.model.config,
            vocab_size=self.model.vocab_size,
            device=self.precision.device,
            processes=self.team.size,
        )
        largest = self.batches.largest.share(self.team.rank, self.team.size)
        if self.config.parallel.strategy == "fsdp" and self.step.micro_batch_size is None:
            # By formula: in a dry step that fits into the memory of one only, the others would wait for ever.
            chosen = needed.chosen_micro_batch(room or total_memory(self.precision.device), largest.num_sequences)
            self.step.micro_batch_size = self.team.least(max(1, chosen))
        self.step.find_micro_batch_size(
            largest,
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
            team=self.team,
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
                OwnShare(self.batches, self.team),
                num_steps=self.total_steps,
                pin_memory=self.precision.device.type == "cuda",
            ),
            evaluate=self.evaluate,
            capture=self._capture,
            checkpoints=self._checkpoints(folder),
            objective=self.config.objectives[0],
            record=record,
            progress=progress,
            prepare=self.find_micro_batch_size,
            run_name=str(folder),
            judge=judge,
            warmup_steps=self.settling_steps,
            diagnostics=Diagnostics(self.model, histograms=folder.histograms)
            if self.config.trainer.diagnostics and self.team.leads
            else None,
            utilisation=self._utilisation() if self.team.leads else lambda tokens_per_second: {},
            agree=self.team.largest,
            profiler=StepProfiler(
                folder.profile, self.precision.device, first=progress.step, total_steps=self.total_steps
            )
            if trainer.profile and self.team.leads
            else None,
        )

    def _checkpoints(self, folder: RunDir) -> Checkpoints:
        """Where this process saves to: all of it, its share, or nothing."""
        if not self.team.leads and self.config.parallel.strategy != "fsdp":
            return NoCheckpoints()
        target = CheckpointFolder(folder.checkpoints, keep=self.config.trainer.keep_checkpoints, files=self.files)
        return CheckpointWriter(target.save if self.team.leads else target.save_share)

    def _capture(self, progress: dict[str, Any]) -> Checkpoint:
        """What is trained, and what else must be known to continue it to the bit."""
        # The microbatch decides how sums are rounded.
        microbatch = {"setting": self.config.trainer.micro_batch_size, "in_use": self.step.micro_batch_size}
        meta = {"progress": progress, "data_fingerprint": self.data_fingerprint, "micro_batch_size": microbatch}
        return capture(self.model, self.step.optimizers, self.step.scaler, meta, self.team)

    def _utilisation(self) -> Utilisation:
        device, format = self.precision.device, self.precision.format
        peak = peak_flops(device, format)
        if peak is None and self.config.trainer.diagnostics:
            peak = measured_peak(device, format, torch.get_num_threads())
        tokens = flops_per_token(self.model.config, self.model.vocab_size, self.config.data.seq_len)
        # The speed is that of all processes, each on a device of its own.
        together = None if peak is None else peak * self.team.size
        return Utilisation(device, flops_per_token=tokens, peak_flops=together)


def build_session(config: ExperimentConfig, data: PreparedData, device: torch.device, team: Team = ALONE) -> Session:
    """Build model, optimizers and batches. Raises UsageError if they do not fit together, or into memory."""
    with team.agreeing():
        config, model_choice = settle_model(config, vocab_size=data.tokenizer.vocab_size, device=device)
        batches = train_batches(config, data)
        if batches.note:
            log.info(batches.note)
        if config.batch_size < team.size:
            raise HardwareError(f"batch_size={config.batch_size} leaves some of the {team.size} processes without work")
        total_steps = count_steps(config, batches)
        warmup_length(config.schedule, total_steps)  # refused here if it is too long
    torch.manual_seed(config.seed)
    model, step = build_step(
        config,
        batches.largest,
        data.tokenizer.vocab_size,
        device,
        team,
        begin=None if config.init_from is None else lambda model: load_initial_weights(model, config, data),
    )
    divided = config.parallel.strategy == "fsdp"
    if team.rank:  # dropout of its own
        torch.manual_seed(config.seed + team.rank)
    session = Session(
        config=replace(
            config,
            device=device.type,  # type: ignore[arg-type]  # one of those there are to choose from
            precision=replace(config.precision, format=step.precision.name),
            trainer=replace(config.trainer, pad_vocab=model.pad_vocab),
        ),
        model=model,
        forward=step.forward,
        team=team,
        files=DividedFiles(team, divided_like(model, step.optimizers)) if divided else WholeFiles(),
        step=step,
        batches=batches,
        val_batches=val_batches(config, data),
        val_bytes_per_token=data.bytes_per_target("val"),
        data_fingerprint=data.fingerprint,
        tokenizer_fingerprint=data.tokenizer.fingerprint,
        total_steps=total_steps,
        model_choice=model_choice,
    )
    fit = session.find_micro_batch_size
    config = settle_threads(session.config, step, batches.largest, total_steps, fit)
    config = settle_compile(config, step, batches, total_steps, fit)  # second: it counts there how fast steps are
    return replace(session, config=config)
