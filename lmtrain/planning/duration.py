"""How long a run takes and what energy, from what its parts take: steps, evaluations, checkpoints.

By formula here, to a factor of two or so, which tells an hour from a night; `probe` measures the parts instead.
Start-up, preparing the text, writing checkpoints in the background and the pictures at the end are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lmtrain.config.schema import ExperimentConfig
from lmtrain.hardware import FORMATS, available_memory, choose_device, set_threads
from lmtrain.machine import available_cores, count_gpus
from lmtrain.model.sizing import block_shapes
from lmtrain.planning.plan import Plan
from lmtrain.planning.power import Power
from lmtrain.training.utilisation import measured_peak, peak_flops

SHARE_OF_PEAK = {"cpu": 0.5, "cuda": 0.35, "mps": 0.35}
"""What training reaches of the speed of large matrix products, models of some million parameters and more."""

SECONDS_A_LAYER = 0.8e-3
"""What a pass takes at least for each layer, and twice for what is around them: calls, not arithmetic."""

RECOMPUTED = {"none": 0.0, "selective": 0.05, "full": 1 / 3}
"""Arithmetic that checkpointing does again in the backward pass, as a share of all; selective: but products."""

JOULES_A_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What counts of the hardware here."""

    device: torch.device
    peak: float  # matrix products, FLOP/s
    measured: bool  # or by the data sheet
    free_memory: float  # bytes, of the device
    threads: int  # of a run

    @classmethod
    def measure(cls, config: ExperimentConfig) -> Machine:
        """This machine, in the format of a run. Takes a tenth of a second. Raises HardwareError."""
        device = choose_device(config.device)
        usual = torch.bfloat16 if device.type == "cuda" else torch.float32
        format = FORMATS.get(config.precision.format, usual)
        listed = peak_flops(device, format)
        free = float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory()
        threads = set_threads(config.parallel.num_threads)
        return cls(
            device=device,
            peak=listed or measured_peak(device, format, threads),
            measured=listed is None,
            free_memory=free,
            threads=threads,
        )

    @property
    def name(self) -> str:
        """For people."""
        if self.device.type == "cuda":
            return f"one {torch.cuda.get_device_name(self.device)}"
        return f"{self.threads} CPU thread{'s' * (self.threads > 1)}" if self.device.type == "cpu" else "the GPU"

    @property
    def speed(self) -> float:
        """FLOP/s that training is taken to reach."""
        return self.peak * SHARE_OF_PEAK[self.device.type]

    @property
    def basis(self) -> str:
        """What the time by formula rests on, in words."""
        source = "measured just now" if self.measured else "by its data sheet"
        return (
            f"from the arithmetic of a token and {SHARE_OF_PEAK[self.device.type]:.0%} of {self.peak / 1e9:,.0f} "
            f"GFLOP/s in matrix products ({source})"
        )

    def at_once(self, workers: int) -> int:
        """How many runs here go on at full speed."""
        places = count_gpus() if self.device.type == "cuda" else available_cores() // self.threads
        return max(1, min(workers, places))


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of what a run is made of."""

    batch: float  # forward and backward pass of a full batch, by microbatches
    update: float  # of the weights, once a step
    evaluated_sequence: float
    checkpoint: float  # what training waits for
    basis: str  # where these come from


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of a whole run. What is None is not known before the text is prepared."""

    training: float
    evaluation: float | None
    checkpoints: float

    @property
    def seconds(self) -> float:
        """Of all that is known."""
        return self.training + (self.evaluation or 0.0) + self.checkpoints


def pace_by_formula(plan: Plan, machine: Machine) -> Pace:
    """What follows from arithmetic and a share of the peak, never less than the calls take.

    Of several devices, each goes through its share of a batch; what they exchange is not counted.
    """
    config = plan.config
    forward_and_backward = plan.flops_per_token * config.data.seq_len / machine.speed  # of a sequence
    trained = forward_and_backward * (1 + RECOMPUTED[config.trainer.activation_checkpointing])
    share = plan.share
    size = min(max(1, plan.micro_batch_size), share)
    calls = SECONDS_A_LAYER * (len(block_shapes(plan.model)) + 2)
    return Pace(
        batch=max(trained * share, calls * math.ceil(share / size)),
        update=0.0,
        evaluated_sequence=forward_and_backward / 3,
        checkpoint=0.0,
        basis=machine.basis,
    )


def duration(plan: Plan, pace: Pace) -> Duration | None:
    """How long the run of a plan takes at a pace; None if its length is not known before the text is prepared."""
    budget = plan.budget
    if budget.steps is None or budget.sequences is None:
        return None
    full_batches = budget.sequences / plan.config.batch_size
    evaluated = budget.evaluated_sequences
    return Duration(
        training=full_batches * pace.batch + budget.steps * pace.update,
        evaluation=None if evaluated is None else budget.evaluations * evaluated * pace.evaluated_sequence,
        checkpoints=budget.checkpoints * pace.checkpoint,
    )


def energy_kwh(seconds: float, power: Power | None, devices: int = 1) -> float | None:
    """What so many devices take in so many seconds; None if their power is not known."""
    return None if power is None else power.watts * devices * seconds / JOULES_A_KWH


def duration_text(seconds: float) -> str:
    """A duration no more exact than it is known."""
    units = ((1, "s", 90), (60, "min", 90), (3600, "h", 72))
    size, unit = next(((size, unit) for size, unit, most in units if seconds < size * most), (86400, "days"))
    number = seconds / size
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.2g} {unit}"
