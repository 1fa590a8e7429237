"""Settings → whether the step of a run is compiled: what `trainer.compile` asks for, or what `auto` comes to.

Not here: how a step is compiled, and what is measured (`training/compilation.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
from collections.abc import Callable

import torch

from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.batches import Batch, TrainBatches
from lmtrain.data.cache import cache_folder
from lmtrain.training.compilation import (
    MIN_STEPS,
    CompileChoice,
    CompileRecords,
    choose_to_compile,
    keep_compiled_code,
    missing_compiler,
    require_compiler,
)
from lmtrain.training.step import TrainingStep

log = logging.getLogger(__name__)

EXAMPLES = 4
"""Batches of a run whose speed is measured where batches have many sizes, besides the largest."""


def compile_if_asked(config: ExperimentConfig, step: TrainingStep) -> None:
    """For `trainer.compile=true`. Raises HardwareError if it cannot be done here."""
    if config.trainer.compile is True:
        require_compiler(step.precision.device)
        keep_compiled_code(cache_folder(config.data))
        log.info("compile: yes: the first step waits for it, half a minute or more where the code is not in the cache")
        step.compile(dynamic=sizes_vary(config))


def settle_compile(
    config: ExperimentConfig,
    step: TrainingStep,
    batches: TrainBatches,
    total_steps: int,
    find_micro_batch_size: Callable[[], None],
) -> ExperimentConfig:
    """The settings with what `trainer.compile=auto` comes to; the step is compiled then, if it is to be."""
    if config.trainer.compile != "auto":
        return config
    compiled = False
    if total_steps >= MIN_STEPS:
        choice = _choose(config, step, batches, total_steps, find_micro_batch_size)
        log.info("compile: %s", choice.reason)
        compiled = choice.compile
    if not compiled:
        step.run_eagerly()
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, compile=compiled))


def sizes_vary(config: ExperimentConfig) -> bool:
    """Whether batches have many sizes."""
    trainer = config.trainer
    ramps = (trainer.batch_size_warmup_steps, trainer.seq_len_warmup_steps)
    return config.data.batches == "padded" or any(steps is not None for steps in ramps)


def _choose(
    config: ExperimentConfig,
    step: TrainingStep,
    batches: TrainBatches,
    total_steps: int,
    find_micro_batch_size: Callable[[], None],
) -> CompileChoice:
    device = step.precision.device
    reasons = {
        "no: not tried on several processes": config.parallel.strategy != "single",
        f"no: {missing_compiler(device)}": missing_compiler(device) is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            return CompileChoice(compile=False, reason=reason)
    try:
        find_micro_batch_size()
        size = step.micro_batch_size or batches.largest.num_sequences
        parts = _examples(config, batches, total_steps, size)
        keep_compiled_code(cache_folder(config.data))

        def dry_passes() -> None:
            for part in parts:
                step.dry_pass(part)

        def compiled_passes() -> None:
            step.compile(dynamic=sizes_vary(config))
            dry_passes()

        return choose_to_compile(
            dry_passes=dry_passes,
            compiled_passes=compiled_passes,
            at_once=len(parts),
            passes=total_steps * math.ceil(config.batch_size / size),
            num_blocks=sum(1 for _ in step.model.all_blocks()),  # type: ignore[operator, misc]
            device=device,
            records=CompileRecords(cache_folder(config.data), shape_of(config, step, parts[0])),
        )
    except torch.OutOfMemoryError:  # the run will tell
        return CompileChoice(compile=False, reason="no: there is not memory enough to try")


def _examples(config: ExperimentConfig, batches: TrainBatches, total_steps: int, size: int) -> list[Batch]:
    """The microbatches that are timed: one of the largest batch; where sizes vary, the mean over batches of the run."""
    steps = range(0, total_steps, math.ceil(total_steps / EXAMPLES)) if sizes_vary(config) else ()
    return [next(batch.split(size)) for batch in (batches.largest, *(batches[step] for step in steps))]


def shape_of(config: ExperimentConfig, step: TrainingStep, part: Batch) -> dict[str, object]:
    """All that the speed of a pass depends on, and compiled code, on this machine."""
    device = step.precision.device
    on_gpu = device.type == "cuda"
    return {
        "model": dataclasses.asdict(config.model),
        "parameters": [list(parameter.shape) for parameter in step.parameters],
        "inputs": [list(tensor.shape) for tensor in (part.inputs, *part.context.values())],
        "sizes vary": sizes_vary(config),
        "dropout": config.dropout > 0,
        "pad_vocab": step.model.pad_vocab,
        "format": step.precision.name,
        "loss": [config.trainer.label_smoothing, config.trainer.z_loss],
        "checkpointing": config.trainer.activation_checkpointing,
        "processor": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} {platform.node()}",
        "threads": torch.get_num_threads(),
    }
