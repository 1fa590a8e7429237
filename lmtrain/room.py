"""Whether the machine has room for a training at all: refused before text is prepared or a folder is made.

Owns what is refused, which is only what cannot be: more than all of the memory, by more than the formulas may be wrong.
What fits is settled by a dry step when a run starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lmtrain.config.schema import AdafactorConfig, AutoModelConfig, ExperimentConfig, SGDConfig, TransformerConfig
from lmtrain.data.vocabulary import vocabulary_size
from lmtrain.distributed.placement import find_placement
from lmtrain.errors import NotEnoughMemoryError
from lmtrain.fitting import MEMORY_OF, bytes_text, settle_model, training_memory
from lmtrain.hardware import total_memory
from lmtrain.training.footprint import Part, TrainingMemory

ERROR_OF_FORMULA = 1.10
"""Activations and their like are said to be at most so many times what they are: the tests hold it."""

EXACT: tuple[Part, ...] = ("weights", "optimizer state", "checkpoint copy")

NOT_NEEDED: tuple[Part, ...] = ("allocator's gaps", "program")
"""What may be less, or is in memory of its own."""

SHORTEST = 64
"""Tokens of a sequence that is still worth proposing."""

LARGEST_VOCABULARY = 300_000
"""Where even that fits, the size of a vocabulary need not be read from its file."""


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """A training that cannot be: what it needs at the least, and what there is."""

    parts: dict[Part, float]  # bytes, the largest first
    room: float
    place: str

    @property
    def needed(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        largest = ", ".join(f"{part} {bytes_text(size)}" for part, size in list(self.parts.items())[:3])
        return (
            f"to train on one sequence at a time takes at least {bytes_text(self.needed)} ({largest}), and there are "
            f"{bytes_text(self.room)} of {self.place}"
        )


def require_room(config: ExperimentConfig, device: torch.device) -> None:
    """Refuse what cannot be trained; not with `force`. Raises NotEnoughMemoryError."""
    if not config.force and (found := shortage(config, device)) is not None:
        raise NotEnoughMemoryError(f"{found}\n{remedies(config, device)}")


def shortage(config: ExperimentConfig, device: torch.device) -> Shortage | None:
    """Why not one sequence at a time can be trained in all of the memory; None if it may be possible.

    Of a run of several processes, as many as there are now. Raises HardwareError if no model
    is small enough for `model=auto`.
    """
    if not isinstance(config.model, AutoModelConfig) and _shortage(config, device, LARGEST_VOCABULARY) is None:
        return None
    known = vocabulary_size(config.tokenizer, config.data)
    if known is not None and isinstance(config.model, AutoModelConfig):
        settle_model(config, vocab_size=known, device=device)
    return _shortage(config, device, known or 1)


def remedies(config: ExperimentConfig, device: torch.device) -> str:
    """What would make it fit, the cheapest first."""
    found: list[str] = []
    for kind in _changes(config):
        helping = (words for words, changed in kind if shortage(changed, device) is None)
        found.extend(itertools.islice(helping, 1))
    ways = [*found[:2], "a smaller model"]
    if not found and config.parallel.strategy != "fsdp":
        ways.append("parallel=fsdp on several devices")
    return f"take, the cheapest first: {'; or '.join(ways)}; force=true goes on all the same"


def _changes(config: ExperimentConfig) -> Iterator[Iterator[tuple[str, ExperimentConfig]]]:
    """Settings that need less, with their words: by kind, first what costs time, then what costs quality."""
    full = replace(config, trainer=replace(config.trainer, activation_checkpointing="full"))
    words = [] if full == config else ["trainer.activation_checkpointing=full"]
    lengths = (config.data.seq_len // 2**halvings for halvings in range(1, 20))
    others = [] if isinstance(config.optimizer, SGDConfig | AdafactorConfig) else [AdafactorConfig()]
    yield ((word, full) for word in words)
    yield (
        (f"data.seq_len={length}", replace(config, data=replace(config.data, seq_len=length)))
        for length in lengths
        if length >= SHORTEST
    )
    yield ((" ".join([*words, "optimizer=adafactor"]), replace(full, optimizer=other)) for other in others)


def _shortage(config: ExperimentConfig, device: torch.device, vocab_size: int) -> Shortage | None:
    model, placement = config.model, find_placement()
    if not isinstance(model, TransformerConfig):
        return None
    formats: list[Literal["auto", "fp32", "bf16", "fp16", "fp8"]] = (
        ["fp32", "bf16"] if config.precision.format == "auto" else [config.precision.format]
    )
    room = _total_memory(device) / (placement.local_size if device.type == "cpu" else 1)
    found = []
    for format in formats:
        tried = replace(config, precision=replace(config.precision, format=format))
        memory = training_memory(tried, model, vocab_size=vocab_size, device=device, processes=placement.size)
        found.append(_least(memory, config))
    parts = min(found, key=lambda parts: sum(parts.values()))
    missing = Shortage(parts=parts, room=room, place=MEMORY_OF[device.type])
    return missing if missing.needed > room else None


def _least(memory: TrainingMemory, config: ExperimentConfig) -> dict[Part, float]:
    """Bytes that cannot be done without at the fullest moment, the largest first."""
    moments = memory.footprint(1, config.batch_size).moments
    # A compiled model keeps less of its passes than is counted; what a process gathers of a divided one is at the most.
    divided = memory.division.divides_weights
    named = ["update"] if config.trainer.compile is True or divided else list(moments)
    left_out = (*NOT_NEEDED, "working memory") if divided else NOT_NEEDED
    least: list[dict[Part, float]] = [
        {
            part: size if part in EXACT else size / ERROR_OF_FORMULA
            for part, size in moments[name].items()
            if part not in left_out
        }
        for name in named
    ]
    fullest = max(least, key=lambda parts: sum(parts.values()))
    return dict(sorted(fullest.items(), key=lambda part: -part[1]))


def _total_memory(device: torch.device) -> float:
    """Of MPS all main memory: what the system recommends for GPUs can be exceeded."""
    return total_memory(torch.device("cpu") if device.type == "mps" else device)
