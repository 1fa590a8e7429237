"""Short real steps: what the formulas say of time and memory, measured here, with random tokens where there is no text.

The real model, optimizer, microbatches and number format, one evaluated batch, one copy for a checkpoint. Writes
nothing. Where a microbatch would take long, fewer sequences go through and their time is scaled.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, median

import torch

from lmtrain.config.schema import EncoderDecoderConfig, ParallelConfig
from lmtrain.data.batches import Batch
from lmtrain.errors import HardwareError
from lmtrain.feeding import train_batches
from lmtrain.planning.duration import Pace
from lmtrain.planning.plan import Plan
from lmtrain.planning.power import EnergyMeter, Power
from lmtrain.step_building import build_step
from lmtrain.training.checkpoint import capture
from lmtrain.training.evaluation import measure
from lmtrain.training.footprint import PROGRAM_BYTES
from lmtrain.training.step import TrainingStep
from lmtrain.training.utilisation import PeakBytes

SECONDS = 2.0
"""Steps are timed until so many have passed; two are always made."""

LONG_PASS = 8.0
"""Seconds by formula from which on a microbatch is too long to be timed whole."""

MAX_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured."""

    pace: Pace
    peak: float  # bytes of the device's memory, the most at any time
    formula_peak: float  # what the formula says of the same: fewer sequences may have gone through at a time
    micro_batch_size: int  # sequences that did
    steps: int  # timed
    scaled: bool  # whether a step was longer than what was timed
    power: Power | None

    @property
    def memory_ratio(self) -> float:
        """What the formula is to be multiplied with here."""
        return self.peak / self.formula_peak


class _Clock:
    """Sees when the weights begin to move and when they have."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.updating = 0.0

    def now(self) -> float:
        """Seconds, when the device has done all it was told to do."""
        if self._device.type in ("cuda", "mps"):
            getattr(torch, self._device.type).synchronize()
        return time.perf_counter()

    def before_update(self) -> None:
        self._began = self.now()

    def after_update(self) -> None:
        self.updating = self.now() - self._began


def probe(plan: Plan, formula: Pace) -> Probe:
    """Measure the run of a plan on this machine, which takes some seconds.

    `formula` tells how much can be timed. Raises HardwareError if not one sequence at a time fits.
    """
    share = plan.share
    told = min(max(1, plan.micro_batch_size), share)
    affordable = max(1, int(LONG_PASS / max(formula.batch / share, 1e-9)))
    size = min(told, affordable)
    passes = min(2, math.ceil(share / size)) if 2 * size <= affordable else 1
    batches = _batches(plan, min(share, passes * size))
    config = dataclasses.replace(
        plan.config,
        parallel=ParallelConfig(num_threads=plan.config.parallel.num_threads),
        trainer=dataclasses.replace(plan.config.trainer, micro_batch_size=size, compile=False),
        init_from=None,
    )
    torch.manual_seed(0)
    first = next(batches)
    try:
        with PeakBytes(plan.device) as memory:
            model, step = build_step(config, first, plan.vocab_size, plan.device)
            timed = _time_steps(step, first, batches, uneven=plan.config.data.batches == "padded")
            evaluated = _time_evaluation(step, next(first.split(min(size, 8))), plan.device)
            saved = _time_checkpoint(model, step, plan.device)
    except torch.OutOfMemoryError as error:
        raise HardwareError(f"the probe ran out of memory with {size} sequences at a time: {error}") from error
    accumulated = size < share
    expected = plan.memory.footprint(size, size + 1 if accumulated else size).peak - plan.memory.beside_training
    if plan.device.type == "cuda":
        expected -= PROGRAM_BYTES["cuda"]  # the context is not PyTorch's
    return Probe(
        pace=Pace(
            batch=timed.passes * share,
            update=timed.update,
            evaluated_sequence=evaluated,
            checkpoint=saved,
            basis="measured just now",
        ),
        peak=memory.peak,
        formula_peak=expected,
        micro_batch_size=size,
        steps=timed.steps,
        scaled=min(share, passes * size) < share,
        power=timed.power,
    )


@dataclass(frozen=True, kw_only=True)
class _Timed:
    passes: float  # seconds of a sequence
    update: float
    steps: int
    power: Power | None


def _time_steps(step: TrainingStep, first: Batch, batches: Iterator[Batch], *, uneven: bool) -> _Timed:
    """The typical step, after one to warm up; of learning rate 0, so that random tokens do no harm."""
    device = step.precision.device
    clock = _Clock(device)
    passes: list[float] = []
    updates: list[float] = []
    step(first, 0.0)
    began = clock.now()
    with EnergyMeter(device) as meter:
        while len(passes) < MAX_STEPS and (not passes or clock.now() - began < SECONDS):
            batch = next(batches)
            before = clock.now()
            step(batch, 0.0, clock)
            passes.append((clock.now() - before - clock.updating) / batch.num_sequences)
            updates.append(clock.updating)
    typical = fmean if uneven else median
    return _Timed(passes=typical(passes), update=typical(updates), steps=len(passes), power=meter.power)


def _time_evaluation(step: TrainingStep, batch: Batch, device: torch.device) -> float:
    """Seconds of a sequence, after one pass to warm up."""
    clock = _Clock(device)
    step.model.eval()
    for _ in range(2):
        began = clock.now()
        measure(step.forward, batch, step.precision)
        seconds = clock.now() - began
    step.model.train()
    return seconds / batch.num_sequences


def _time_checkpoint(model: torch.nn.Module, step: TrainingStep, device: torch.device) -> float:
    """Seconds of copying what a checkpoint holds into memory that is there already, as training waits for it."""
    clock, held = _Clock(device), capture(model, step.optimizers, step.scaler, {})
    tensors = [*held.model.values(), *held.state.values()]
    copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    began = clock.now()
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor.detach())
    return clock.now() - began


def _batches(plan: Plan, num_sequences: int) -> Iterator[Batch]:
    """Endless batches of so many sequences: of the text where rows are as long as its documents, else random tokens."""
    if plan.data is not None and plan.config.data.batches == "padded":
        of_the_run = train_batches(dataclasses.replace(plan.config, batch_size=num_sequences), plan.data)
        for number in range(1_000_000):
            yield of_the_run.largest if number == 0 else of_the_run[number - 1]
    random = torch.Generator().manual_seed(0)
    shape = (num_sequences, plan.config.data.seq_len)

    def tokens() -> torch.Tensor:
        return torch.randint(plan.vocab_size, shape, generator=random)

    while True:
        batch = Batch(tokens(), tokens(), num_targets=math.prod(shape))
        if isinstance(plan.model, EncoderDecoderConfig):
            sources = tokens()
            batch = dataclasses.replace(batch, sources=sources, source_mask=torch.ones_like(sources, dtype=torch.bool))
        elif plan.config.data.batches == "packed_documents":
            documents = torch.arange(shape[1]) * 4 // shape[1]  # four in each row
            batch = dataclasses.replace(batch, documents=documents.expand(shape).contiguous())
        yield batch
