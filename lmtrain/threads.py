"""Settings → the CPU threads of a run: what `parallel.num_threads=auto` comes to, by timing steps of that run.

With all the cores of a large machine a small model is slower than with a few, which wait less for each other. Not here:
how several runs share a machine (`places.py`, `sweep/core_division.py`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from lmtrain.compiling import shape_of
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.batches import Batch
from lmtrain.data.cache import cache_folder
from lmtrain.data.sources.files import read_note, write_note
from lmtrain.hardware import CoresLeft, threads_of_environment
from lmtrain.machine import available_cores
from lmtrain.training.memory import leaving_no_trace
from lmtrain.training.step import TrainingStep

log = logging.getLogger(__name__)

MIN_GAIN = 1.1
"""Fewer threads must be so many times as fast as all: noise shall not decide which bits a run has."""

SHARE = 0.02
"""Of the time that a run's steps take, what timing some before may take."""

LEAST_STEPS = 10
"""How many steps timing takes at the least, if it is to be worth anything."""

CLOSE = 1.25
"""Times as slow as another number of threads, from which on one need not be timed again."""

VISITS = 3
"""How often all threads and the fastest other number are timed."""

QUIET = 0.85
"""Share of the cores that other programs leave on a machine where timing tells something ..."""

SEEN_FROM = 0.25
"""... and seconds from which on it is known: systems count in hundredths."""

SLOW_STEP = 2.0
"""Seconds; a model so large keeps all cores busy."""

Times = dict[int, float]
"""Seconds of a step by number of threads, that of all cores first."""


def settle_threads(
    config: ExperimentConfig,
    step: TrainingStep,
    largest: Batch,
    total_steps: int,
    find_micro_batch_size: Callable[[], None],
) -> ExperimentConfig:
    """The settings with the number that `auto` comes to, which this process has from now on.

    Nothing of the steps that are timed stays. Several processes share the cores evenly, and what is on a GPU does not
    depend on them: no number is named then.
    """
    if config.parallel.num_threads != "auto":
        return config
    threads = None
    if step.precision.device.type == "cpu" and config.parallel.strategy == "single":
        threads = threads_of_environment() or _choose(config, step, largest, total_steps, find_micro_batch_size)
        torch.set_num_threads(threads)
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, num_threads=threads))


def candidates(cores: int) -> list[int]:
    """All cores, and the powers of two below."""
    powers = [2**exponent for exponent in range(cores.bit_length()) if 2**exponent < cores]
    return [cores, *reversed(powers)]


def time_threads(seconds_a_step: Callable[[int], float], counts: Sequence[int], *, affordable_steps: float) -> Times:
    """Medians of what `seconds_a_step` finds, which makes two steps, for so many threads.

    From all threads, the first of `counts`, downwards until fewer are clearly slower; then all and the fastest of the
    others again in turn, unless all are clearly faster. `affordable_steps` are steps with all threads.
    """
    everything = counts[0]
    found: dict[int, list[float]] = {}
    began = time.perf_counter()

    def affordable(seconds: float) -> bool:
        return time.perf_counter() - began + seconds <= affordable_steps * found[everything][0]

    for count in counts:
        found[count] = [seconds_a_step(count)]
        best = min(times[0] for times in found.values())
        if found[count][0] > CLOSE * best or not affordable(2 * (found[everything][0] + 2 * best)):
            break
    others = [count for count in found if count != everything]
    for number in range(VISITS - 1 if others else 0):
        duel = (everything, min(others, key=lambda count: median(found[count])))
        seconds, rival = (median(found[count]) for count in duel)
        if rival > CLOSE * seconds or (number and not affordable(2 * (seconds + rival))):
            break
        for count in duel:
            found[count].append(seconds_a_step(count))
    return {count: median(times) for count, times in found.items()}


def choose(times: Mapping[int, float]) -> int:
    """The fastest number of threads; all of them, which come first, unless fewer are clearly faster."""
    everything = next(iter(times))
    fastest = min(times, key=lambda count: times[count])
    return fastest if times[everything] >= MIN_GAIN * times[fastest] else everything


def _choose(
    config: ExperimentConfig,
    step: TrainingStep,
    largest: Batch,
    total_steps: int,
    find_micro_batch_size: Callable[[], None],
) -> int:
    """By what is noted of an earlier run of this shape here, or by timing if the run is long enough."""
    counts = candidates(available_cores())
    cache, key = cache_folder(config.data), _identity(config, step, largest, counts)
    times = _noted(cache_note := read_note(cache, key))
    if times is None and len(counts) > 1 and total_steps * SHARE >= LEAST_STEPS:
        try:
            find_micro_batch_size()
            with CoresLeft() as cores:
                times = _measure(step, largest, counts, total_steps * SHARE)
        except torch.OutOfMemoryError:  # the run will tell
            return counts[0]
        if cores.seconds > SEEN_FROM and cores.share(counts[0]) < QUIET:
            log.info("threads: all %d: other programs keep cores busy, so timing steps tells little", counts[0])
            return counts[0]
        write_note(cache, key, json.dumps(list(times.items())))
    if times is None:
        return counts[0]
    chosen = choose(times)
    log.info("threads: %s%s", _in_words(times, chosen), " (measured before)" if cache_note else "")
    return chosen


def _measure(step: TrainingStep, batch: Batch, counts: Sequence[int], affordable_steps: float) -> Times:
    """Whole steps, forward to optimizer, of the run's own model; its compiled code would be another for each number."""

    def seconds_a_step(threads: int) -> float:
        torch.set_num_threads(threads)
        least = float("inf")
        for _ in range(2):  # in the first, threads may have to be started
            began = time.perf_counter()
            step(batch, 0.0)
            least = min(least, time.perf_counter() - began)
        return least

    with step.uncompiled(), leaving_no_trace(step.parameters, step.optimizers, step.precision.device):
        began = time.perf_counter()
        step(batch, 0.0)
        first = time.perf_counter() - began
        if first > SLOW_STEP:
            return {counts[0]: first}
        return time_threads(seconds_a_step, counts, affordable_steps=affordable_steps - 1)


def _identity(config: ExperimentConfig, step: TrainingStep, batch: Batch, counts: Sequence[int]) -> list[object]:
    size = config.trainer.micro_batch_size
    return ["threads", shape_of(config, step, batch), dataclasses.asdict(config.optimizer), size, list(counts)]


def _noted(note: str | None) -> Times | None:
    try:
        return None if note is None else {int(count): float(seconds) for count, seconds in json.loads(note)}
    except (ValueError, TypeError):
        return None


def _in_words(times: Mapping[int, float], chosen: int) -> str:
    everything = next(iter(times))
    name = f"all {everything}" if chosen == everything else f"{chosen} of {everything}"
    if len(times) == 1:
        return f"{name}: a step of {times[chosen]:.2g} s keeps them busy"
    others = ", ".join(f"{count}: {1e3 * seconds:.3g}" for count, seconds in times.items() if count != chosen)
    return f"{name}: {1e3 * times[chosen]:.3g} ms a step ({others}); fewer than all must be {MIN_GAIN}× as fast"
