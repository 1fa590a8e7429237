"""How long a run takes and how much memory it needs, by arithmetic and a tenth of a second of measuring.

The time is right to a factor of two or so, which is enough to tell an hour from a night. Reads no text and builds no
model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmtrain.config.schema import ExperimentConfig, TransformerConfig
from lmtrain.data.evaluation import EVAL_BATCH_SEQUENCES
from lmtrain.data.vocabulary import USUAL_CHARACTERS, vocabulary_size
from lmtrain.fitting import settle_model, training_memory
from lmtrain.hardware import FORMATS, available_memory, choose_device, set_threads
from lmtrain.machine import available_cores, count_gpus
from lmtrain.model.sizing import block_shapes, flops_per_token
from lmtrain.sweep.setup import first_evaluation, token_budget
from lmtrain.training.utilisation import measured_peak, peak_flops

SHARE_OF_PEAK = {"cpu": 0.5, "cuda": 0.35, "mps": 0.35}
"""What training reaches of the speed of large matrix products, models of some million parameters and more."""

SECONDS_A_LAYER = 0.8e-3
"""What a step takes at least for each layer, and twice for what is around them: calls, not arithmetic."""


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
        """What `seconds_of` rests on, in words."""
        source = "measured just now" if self.measured else "by its data sheet"
        return (
            f"from the arithmetic of a token and {SHARE_OF_PEAK[self.device.type]:.0%} of {self.peak / 1e9:,.0f} "
            f"GFLOP/s in matrix products ({source})"
        )

    def at_once(self, workers: int) -> int:
        """How many runs here go on at full speed."""
        places = count_gpus() if self.device.type == "cuda" else available_cores() // self.threads
        return max(1, min(workers, places))


def seconds_of(config: ExperimentConfig, machine: Machine) -> float | None:
    """Duration of a run with all of the machine, evaluations included; None if the budget is not known in tokens."""
    tokens = token_budget(config)
    if tokens is None:
        return None
    model, vocab_size = _model(config, machine)
    steps = tokens / (config.batch_size * config.data.seq_len)
    flops = flops_per_token(model, vocab_size, config.data.seq_len)
    evaluated = (config.trainer.eval_batches or 0) * EVAL_BATCH_SEQUENCES * config.data.seq_len  # 0: all of a text
    forward = evaluated * max(1.0, tokens / first_evaluation(config))
    calls = SECONDS_A_LAYER * (len(block_shapes(model)) + 2)
    return max(flops * tokens / machine.speed, calls * steps) + flops / 3 * forward / machine.speed


def memory_of(config: ExperimentConfig, machine: Machine) -> float:
    """Bytes a run needs of the device's memory at its peak, without what fragmentation takes."""
    model, vocab_size = _model(config, machine)
    memory = training_memory(config, model, vocab_size=vocab_size, device=machine.device)
    micro = config.trainer.micro_batch_size
    return memory.footprint(config.batch_size if micro == "auto" else micro, config.batch_size).peak


def _model(config: ExperimentConfig, machine: Machine) -> tuple[TransformerConfig, int]:
    """The model of a run, with its vocabulary as far as that is known before the text is read."""
    vocab_size = vocabulary_size(config.tokenizer, config.data) or USUAL_CHARACTERS
    settled, _ = settle_model(config, vocab_size=vocab_size, device=machine.device)
    assert isinstance(settled.model, TransformerConfig)
    return settled.model, vocab_size
