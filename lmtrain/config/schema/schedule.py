"""Settings of the learning-rate schedules."""

from __future__ import annotations

from dataclasses import dataclass

from lmtrain.config.schema.rules import require, require_fraction, require_positive


@dataclass(kw_only=True)
class ScheduleConfig:
    """Base of every learning-rate schedule: a linear warm-up, then a shape of its own."""

    warmup_steps: int | None = None  # length of the warm-up in steps; None: by warmup_fraction
    warmup_fraction: float = 0.02  # ... or as a share of all steps

    def __post_init__(self) -> None:
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"schedule.warmup_steps must not be negative, got {self.warmup_steps}",
        )
        require_fraction("schedule.", warmup_fraction=self.warmup_fraction)


def _require_share(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value <= 1, f"schedule.{name} must lie between 0 and 1, got {value}")


@dataclass(kw_only=True)
class DecayConfig(ScheduleConfig):
    """Base of the schedules that come down to a given rate at the end of the run."""

    final_lr_fraction: float = 0.0  # the rate just after the last step, as a share of `lr`

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(final_lr_fraction=self.final_lr_fraction)


@dataclass(kw_only=True)
class CosineConfig(DecayConfig):
    """Half a cosine from `lr` down to the final rate (Loshchilov and Hutter, arXiv:1608.03983)."""


@dataclass(kw_only=True)
class CosineRestartsConfig(DecayConfig):
    """Half a cosine from `lr` down to the final rate, again and again (arXiv:1608.03983)."""

    cycles: int = 4  # cosines from the warm-up to the end of the run
    cycle_mult: float = 1.0  # length of a cycle in lengths of the one before

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("schedule.", cycles=self.cycles, cycle_mult=self.cycle_mult)


@dataclass(kw_only=True)
class LinearConfig(DecayConfig):
    """A straight line from `lr` down to the final rate."""


@dataclass(kw_only=True)
class WarmupStableDecayConfig(DecayConfig):
    """Constant at `lr`, then a straight line down to the final rate (arXiv:2404.06395)."""

    decay_fraction: float = 0.4  # share of all steps spent going down

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(decay_fraction=self.decay_fraction)


@dataclass(kw_only=True)
class ConstantConfig(ScheduleConfig):
    """`lr` from the warm-up to the end."""


@dataclass(kw_only=True)
class InverseSqrtConfig(ScheduleConfig):
    """After the warm-up as one over the root of the step, so that it needs no end (arXiv:1706.03762)."""

    min_lr_fraction: float = 0.0  # never below this share of `lr`

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(min_lr_fraction=self.min_lr_fraction)


@dataclass(kw_only=True)
class PlateauConfig(ScheduleConfig):
    """`lr`, lowered each time the objective has not gained (by trainer.min_delta) for some evaluations."""

    factor: float = 0.5  # what the rate is multiplied by
    patience: int = 2  # evaluations without a gain before each time; trainer.patience ends the run
    min_lr_fraction: float = 0.01  # never below this share of `lr`

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.factor < 1, f"schedule.factor must lie between 0 and 1, got {self.factor}")
        require_positive("schedule.", patience=self.patience)
        _require_share(min_lr_fraction=self.min_lr_fraction)
