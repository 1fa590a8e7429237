"""Learning-rate schedules: plain functions of the step."""

from __future__ import annotations

import math

from lmtrain.config.schema import CosineConfig, LinearConfig, ScheduleConfig, WarmupStableDecayConfig
from lmtrain.errors import ConfigError


def warmup_length(config: ScheduleConfig, total_steps: int) -> int:
    """Steps of the warm-up. Raises ConfigError when they are not fewer than all steps."""
    if config.warmup_steps is None:
        return int(config.warmup_fraction * total_steps)
    if config.warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps ({config.warmup_steps}) must be below the steps of the run ({total_steps})"
        )
    return config.warmup_steps


def lr_at(config: ScheduleConfig, step: int, *, lr: float, total_steps: int) -> float:
    """Learning rate of a step in [0, total_steps).

    The warm-up rises in equal parts and `lr` is reached at the step after it; the shape then falls so that its end
    value belongs to step `total_steps`, just past the last: no step is wasted at a rate of zero.
    """
    warmup = warmup_length(config, total_steps)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total_steps - warmup)
    final = config.final_lr_fraction
    return lr * (final + (1.0 - final) * _shape(config, progress, warmup, total_steps))


def _shape(config: ScheduleConfig, progress: float, warmup: int, total_steps: int) -> float:
    """Height between 1 (after the warm-up, progress 0) and 0 (the end, progress 1)."""
    match config:
        case CosineConfig():
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case LinearConfig():
            return 1.0 - progress
        case WarmupStableDecayConfig():
            decay = config.decay_fraction * total_steps / (total_steps - warmup)
            return 1.0 if decay == 0 else min(1.0, (1.0 - progress) / decay)
    raise TypeError(f"no schedule for {type(config).__name__}")
