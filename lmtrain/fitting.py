"""What fits: from settings to the memory that their training takes, and the preset that `model=auto` comes to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lmtrain.config.presets import sized_presets
from lmtrain.config.schema import AutoModelConfig, ExperimentConfig, TransformerConfig
from lmtrain.errors import HardwareError
from lmtrain.hardware import choose_format, pads_vocab, total_memory
from lmtrain.training.activations import Workload
from lmtrain.training.division import Division
from lmtrain.training.footprint import PROGRAM_BYTES, TrainingMemory
from lmtrain.training.precision import Precision

MEMORY_OF = {"cpu": "main memory", "cuda": "GPU memory", "mps": "GPU memory"}
"""How a device's memory is called."""

MLFLOW_BYTES = int(0.2 * 2**30)
"""Main memory that MLflow takes, measured."""

CPU = torch.device("cpu")


def training_memory(
    config: ExperimentConfig, model: TransformerConfig, *, vocab_size: int, device: torch.device, processes: int = 1
) -> TrainingMemory:
    """What training `model` with these settings takes of the device's memory, of one process if there are several.

    With `precision=auto` a CPU is taken to be used in fp32: which format is faster there is timed when a run starts.
    """
    format, _ = choose_format(config.precision.format, device, lambda: 0.0)
    work = Workload(
        model=model,
        vocab_size=vocab_size,
        seq_len=config.data.seq_len,
        format=Precision(device, format).surrounding,
        device=device.type,  # type: ignore[arg-type]  # one of those there are
        dropout=config.dropout,
        checkpointing=config.trainer.activation_checkpointing,
        separate_documents=config.data.batches == "packed_documents",
        pad_vocab=pads_vocab(config.trainer.pad_vocab, device, format),
        plain_loss=config.trainer.label_smoothing == 0 and config.trainer.z_loss == 0,
    )
    tracked = device.type == "cpu" and config.tracking.mlflow
    parallel = config.parallel
    return TrainingMemory(
        work=work,
        optimizer=config.optimizer,
        division=Division(
            strategy=parallel.strategy,
            processes=processes,
            reshard_after_forward=parallel.reshard_after_forward,
            cpu_offload=parallel.cpu_offload and device.type != "cpu",
        ),
        beside_training=MLFLOW_BYTES if tracked else 0,
        device_memory=total_memory(device),
    )


@dataclass(frozen=True)
class _Need:
    """Memory of a kind that training takes, and how much of it may be taken, in bytes."""

    place: str
    needed: float
    room: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.room


def settle_model(config: ExperimentConfig, *, vocab_size: int, device: torch.device) -> tuple[ExperimentConfig, str]:
    """The settings with a model of a definite shape, and why `model=auto` is that one (empty if it was named).

    It is the largest preset of which one sequence at a time can be trained in a share of the memory there is: in all of
    it, not in what is free at the moment, so that runs on one machine choose alike. On a GPU, the checkpoint's copy has
    to find room in main memory. Raises HardwareError if not even the smallest can be trained.
    """
    auto = config.model
    if not isinstance(auto, AutoModelConfig):
        return config, ""
    chosen: str | None = None
    reason, share = "", f"{auto.memory_share * 100:g} %"
    for name, preset in sized_presets().items():
        memory = training_memory(config, preset, vocab_size=vocab_size, device=device)
        need = _tightest(memory, auto, config.batch_size, device)
        if not need.fits and chosen is None:
            raise HardwareError(
                f"model=auto: to train {name} on a sequence of {config.data.seq_len} tokens at a time needs "
                f"{bytes_text(need.needed)}, and {share} of the {need.place} found are {bytes_text(need.room)}\n"
                "shorten data.seq_len, try trainer.activation_checkpointing=full, or raise model.memory_share"
            )
        if not need.fits:
            reason += f"; {name} would need {bytes_text(need.needed)}"
            reason += "" if need.place == MEMORY_OF[device.type] else f" of {bytes_text(need.room)} of {need.place}"
            break
        chosen = name
        reason = (
            f"model={name}, the largest preset that fits: one sequence at a time, its training needs "
            f"{bytes_text(need.needed)} of {bytes_text(need.room)} ({share} of {need.place})"
        )
    assert chosen is not None
    return replace(config, model=sized_presets()[chosen]), reason


def _tightest(memory: TrainingMemory, auto: AutoModelConfig, batch_size: int, device: torch.device) -> _Need:
    """Of the memories of device and machine, the one that training one sequence at a time takes the larger share of."""
    needed = {device: memory.footprint(1, batch_size).peak}
    if device != CPU:
        needed[CPU] = PROGRAM_BYTES["cpu"] + memory.checkpoint_bytes
    needs = [
        _Need(MEMORY_OF[place.type], size, auto.memory_share * total_memory(place)) for place, size in needed.items()
    ]
    return max(needs, key=lambda need: need.needed / max(need.room, 1.0))


def bytes_text(size: float) -> str:
    """Bytes for people."""
    if size < 2**30:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**30:.2f} GiB" if size < 100 * 2**30 else f"{size / 2**30:,.0f} GiB"
