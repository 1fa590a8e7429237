"""Learning-rate schedules: plain functions of the step.

The one that listens to the objective, reduce-on-plateau, is a function of the step and of a count that the trainer
keeps with its progress.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from lmtrain.config.schema import (
    ConstantConfig,
    CosineConfig,
    CosineRestartsConfig,
    DecayConfig,
    InverseSqrtConfig,
    LinearConfig,
    PlateauConfig,
    ScheduleConfig,
    WarmupStableDecayConfig,
)
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


def lr_at(config: ScheduleConfig, step: int, *, lr: float, total_steps: int, reductions: int = 0) -> float:
    """Learning rate of a step in [0, total_steps); `reductions` counts those of a plateau schedule so far.

    The warm-up rises in equal parts and `lr` is reached at the step after it; a decay then falls so that its end
    value belongs to step `total_steps`, just past the last: no step is wasted at a rate of zero.
    """
    warmup = warmup_length(config, total_steps)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    match config:
        case ConstantConfig():
            return lr
        case InverseSqrtConfig():  # of the step counted from one, scaled to be 1 where the warm-up ends
            return lr * max(config.min_lr_fraction, math.sqrt((warmup + 1) / (step + 1)))
        case PlateauConfig():
            return lr * max(config.min_lr_fraction, config.factor**reductions)
        case DecayConfig():
            final = config.final_lr_fraction
            return lr * (final + (1.0 - final) * _height(config, step - warmup, total_steps - warmup, total_steps))
    raise TypeError(f"no schedule for {type(config).__name__}")


def _height(config: DecayConfig, step: int, length: int, total_steps: int) -> float:
    """Height between 1 (at `step` 0, just after the warm-up) and 0 (at `length`, the end)."""
    progress = step / length
    match config:
        case CosineConfig():
            return _half_cosine(progress)
        case CosineRestartsConfig():
            return _half_cosine(_cycle_progress(config, step, length))
        case LinearConfig():
            return 1.0 - progress
        case WarmupStableDecayConfig():
            decay = config.decay_fraction * total_steps / length
            return 1.0 if decay == 0 else min(1.0, (1.0 - progress) / decay)
    raise TypeError(f"no schedule for {type(config).__name__}")


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _cycle_progress(config: CosineRestartsConfig, step: int, length: int) -> float:
    """How far a step is in its cycle, in [0, 1). Cycles begin at whole steps, so that each begins at the peak."""
    sizes = [config.cycle_mult**number for number in range(config.cycles)]
    bounds = [round(length * sum(sizes[:number]) / sum(sizes)) for number in range(config.cycles + 1)]
    end = bisect_right(bounds, step)
    return (step - bounds[end - 1]) / (bounds[end] - bounds[end - 1])


def reduction_due(config: ScheduleConfig, evaluations_without_gain: int) -> bool:
    """Whether a plateau schedule lowers the rate now: after every `patience` evaluations without a gain."""
    return (
        isinstance(config, PlateauConfig)
        and evaluations_without_gain > 0
        and evaluations_without_gain % config.patience == 0
    )
