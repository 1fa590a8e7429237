"""Learning rates by hand: the edges of the warm-up, the middle, restarts and the end."""

from __future__ import annotations

import math

import pytest

from lmtrain.config.schema import (
    SCHEMAS,
    ConstantConfig,
    CosineConfig,
    CosineRestartsConfig,
    InverseSqrtConfig,
    LinearConfig,
    PlateauConfig,
    ScheduleConfig,
    WarmupStableDecayConfig,
)
from lmtrain.errors import ConfigError
from lmtrain.training.schedules import lr_at, reduction_due, warmup_length

# total 100 steps, warm-up 10, lr 1.1: the warm-up makes eleven equal parts of 0.1
TABLES: list[tuple[ScheduleConfig, dict[int, float]]] = [
    (
        LinearConfig(warmup_steps=10),
        {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.1, 55: 0.55, 99: 1.1 / 90},
    ),
    (
        LinearConfig(warmup_steps=10, final_lr_fraction=0.5),
        {10: 1.1, 55: 0.825, 99: 0.55 + 0.55 / 90},
    ),
    (
        CosineConfig(warmup_steps=10, final_lr_fraction=0.1),
        {0: 0.1, 10: 1.1, 40: 0.11 + 0.99 * 0.75, 55: 0.11 + 0.99 * 0.5, 70: 0.11 + 0.99 * 0.25},
    ),
    (
        WarmupStableDecayConfig(warmup_steps=10, decay_fraction=0.4),
        {0: 0.1, 10: 1.1, 59: 1.1, 60: 1.1, 61: 1.1 * 39 / 40, 80: 0.55, 99: 1.1 / 40},
    ),
    (WarmupStableDecayConfig(warmup_steps=0, decay_fraction=0.0), {0: 1.1, 99: 1.1}),
    (WarmupStableDecayConfig(warmup_steps=0, decay_fraction=1.0), {0: 1.1, 50: 0.55, 99: 0.011}),
    (  # three cycles of 30 steps
        CosineRestartsConfig(warmup_steps=10, cycles=3, final_lr_fraction=0.1),
        {0: 0.1, 10: 1.1, 25: 0.605, 40: 1.1, 50: 0.11 + 0.99 * 0.75, 60: 0.11 + 0.99 * 0.25, 70: 1.1, 85: 0.605},
    ),
    (  # cycles of 100/7, 200/7 and 400/7 steps, which begin at the whole steps 0, 14 and 43
        CosineRestartsConfig(warmup_steps=0, cycles=3, cycle_mult=2.0),
        {0: 1.1, 7: 0.55, 14: 1.1, 43: 1.1, 62: 1.1 * 0.75, 81: 1.1 * 0.25},
    ),
    (CosineRestartsConfig(warmup_steps=10, cycles=1), {10: 1.1, 40: 1.1 * 0.75, 55: 0.55, 70: 1.1 * 0.25}),
    (ConstantConfig(warmup_steps=10), {0: 0.1, 9: 1.0, 10: 1.1, 99: 1.1}),
    (  # peak at the eleventh step: half of it at the 44th, a third at the 99th
        InverseSqrtConfig(warmup_steps=10),
        {0: 0.1, 9: 1.0, 10: 1.1, 43: 0.55, 98: 1.1 / 3},
    ),
    (InverseSqrtConfig(warmup_steps=10, min_lr_fraction=0.4), {43: 0.55, 98: 0.44}),
    (PlateauConfig(warmup_steps=10), {0: 0.1, 10: 1.1, 99: 1.1}),
]


@pytest.mark.parametrize(("config", "table"), TABLES)
def test_rate_of_each_step(config: ScheduleConfig, table: dict[int, float]) -> None:
    for step, expected in table.items():
        assert lr_at(config, step, lr=1.1, total_steps=100) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("config", SCHEMAS["schedule"].values())
@pytest.mark.parametrize("total_steps", [1, 2, 7, 1000])
def test_every_step_moves_and_none_exceeds_the_peak(config: type[ScheduleConfig], total_steps: int) -> None:
    rates = [lr_at(config(), step, lr=3e-4, total_steps=total_steps) for step in range(total_steps)]
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    assert all(math.isfinite(rate) for rate in rates)


def test_warmup_as_a_share_of_the_run() -> None:
    assert warmup_length(LinearConfig(warmup_fraction=0.02), 500) == 10
    assert warmup_length(LinearConfig(warmup_steps=3, warmup_fraction=0.02), 500) == 3


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps \(100\) must be below the steps of the run \(100\)"):
        lr_at(LinearConfig(warmup_steps=100), 0, lr=1.0, total_steps=100)


def test_a_plateau_lowers_the_rate_down_to_its_floor() -> None:
    config = PlateauConfig(warmup_steps=10, factor=0.5, min_lr_fraction=0.2)
    rates = [lr_at(config, 50, lr=1.0, total_steps=100, reductions=count) for count in range(4)]
    assert rates == [1.0, 0.5, 0.25, 0.2]
    assert lr_at(config, 4, lr=1.1, total_steps=100, reductions=2) == pytest.approx(0.5)  # the warm-up is as it was


def test_a_reduction_is_due_after_every_patience_evaluations_without_gain() -> None:
    assert [count for count in range(10) if reduction_due(PlateauConfig(patience=3), count)] == [3, 6, 9]
    assert not any(reduction_due(ConstantConfig(), count) for count in range(10))
