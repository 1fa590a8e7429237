"""How many workers share the cores of this machine: 2 × 1 thread or 1 × 2, whichever trains more in a second.

Decided by a probe of the sweep's own model (`core_probe`), once: the cache keeps what was found.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Sequence

import torch

from lmtrain.config.saved import study_settings
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.cache import cache_folder
from lmtrain.data.sources.files import read_note, write_note
from lmtrain.hardware import choose_device
from lmtrain.machine import available_cores
from lmtrain.planning.plan import make_plan
from lmtrain.sweep.core_probe import Trainees
from lmtrain.tracking.background import one_line

log = logging.getLogger(__name__)

MIN_GAIN = 1.1
"""More workers must train so much faster together: side by side they learn less of each other's results."""

SHAPES = ("model", "optimizer", "precision", "batch_size", "dropout", "data.seq_len", "data.batches", "tokenizer")
SHAPES_OF_STEPS = ("trainer.micro_batch_size", "trainer.activation_checkpointing")
"""Settings that the speed of a step depends on."""

ROUNDS = 2
SECONDS = 0.6  # of each division, each round
ENOUGH_SECONDS = 10.0  # no further round is begun
TIME_LIMIT = 60.0  # of a machine that is busy otherwise; the probe has failed then
SLOW_STEP = 1.0  # seconds; a model so large keeps all cores busy by itself
PROCESS_BYTES = 0.5 * 2**30  # of a process without its training

MOST_PROBED = 16
"""Processes that a probe starts at the most."""


def divide_cores(config: ExperimentConfig, most: int, *, probe: bool = True) -> int:
    """How many workers to launch, of at most `most`, for runs like this one, whose text is prepared.

    Without `probe`, what is known of an earlier one, else `most`. Takes up to 15 s the first time; a probe that fails
    decides nothing.
    """
    if choose_device(config.device).type != "cpu":
        return most
    cores = available_cores()
    divisions = candidates(cores, min(most, _room_for(config)))
    if len(divisions) == 1:
        return divisions[0]
    key = [*_identity(config), divisions]
    cache = cache_folder(config.data)
    note = read_note(cache, key)
    if note is None and not probe:
        return most
    try:
        if note is None:
            began = time.monotonic()
            speeds = _measure(config, divisions, cores)
            write_note(cache, key, json.dumps(speeds))
            source = f"measured in {time.monotonic() - began:.0f} s"
        else:
            speeds, source = json.loads(note), "measured before"
    except Exception as error:
        log.warning("cannot time how workers share the cores: %s", one_line(error))
        return most
    chosen = choose(speeds)
    if probe:
        log.info("workers %s (%s)", _in_words(speeds, chosen, cores), source)
    return chosen


def candidates(cores: int, most: int) -> list[int]:
    """Numbers of workers worth timing: divisors of the cores, each at least twice the one before."""
    found: list[int] = []
    for number in range(1, min(cores, most, MOST_PROBED) + 1):
        if cores % number == 0 and (not found or number >= 2 * found[-1]):
            found.append(number)
    return found or [1]


def choose(speeds: Sequence[Sequence[float]]) -> int:
    """The number of workers, given pairs of workers and steps a second, fewest first: more must be worth it."""
    chosen, fastest = speeds[0]
    for workers, speed in speeds[1:]:
        if speed >= MIN_GAIN * fastest:
            chosen, fastest = workers, speed
    return int(chosen)


def _measure(config: ExperimentConfig, divisions: Sequence[int], cores: int) -> list[tuple[int, float]]:
    """Steps a second of each division, the best of a few turns; of the first alone if a step takes long."""
    best = dict.fromkeys(divisions, 0.0)
    began = time.monotonic()
    with Trainees(config, max(divisions), time_limit=TIME_LIMIT) as trainees:
        alone = trainees.steps_per_second(1, cores, 0.0)
        if alone < 1 / SLOW_STEP:
            return [(1, alone)]
        for turn in range(ROUNDS):
            if turn and time.monotonic() - began > ENOUGH_SECONDS:
                break
            for workers in divisions:
                speed = trainees.steps_per_second(workers, cores // workers, SECONDS)
                best[workers] = max(best[workers], speed)
    return list(best.items())


def _room_for(config: ExperimentConfig) -> int:
    """Runs whose training fits into memory side by side."""
    plan = make_plan(config)
    return max(1, int(plan.room / (plan.footprint.peak + PROCESS_BYTES)))


def _identity(config: ExperimentConfig) -> list[object]:
    shapes = {
        key: value
        for key, value in study_settings(config).items()
        if key in SHAPES_OF_STEPS or any(key == name or key.startswith(f"{name}.") for name in SHAPES)
    }
    return ["cores", shapes, platform.node(), available_cores(), torch.__version__]


def _in_words(speeds: Sequence[Sequence[float]], chosen: int, cores: int) -> str:
    def division(workers: int) -> str:
        threads = cores // workers
        return f"{workers} × {threads} thread{'s' * (threads > 1)}"

    if len(speeds) == 1:
        return f"{division(chosen)}: a step of {1 / speeds[0][1]:.1f} s keeps all cores busy"
    told = ", ".join(f"{division(int(workers))} {speed:.3g} steps/s" for workers, speed in speeds)
    return f"{division(chosen)}: {told}"
