"""The memory of training on one GPU, predicted by formula and measured.

Each setting makes three steps. Predicted is what `lmtrain plan` would say (`lmtrain/training/footprint.py`), measured
is what the device lends: the most that the allocator has reserved, and the program's context beside it. Then the
largest microbatch said to fit is tried for each shape: it must not run out of memory. On a CPU, for a try, the resident
memory of this process stands for both. Needs nothing but PyTorch and PyYAML.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from typing import Any

import torch
from report import Figure, parser, publish
from without_hydra import OPTIMIZERS, VOCABULARIES, Training, preset, settle

from lmtrain.training.utilisation import memory_bytes

MAX_DEVIATION = 10.0  # percent
STEPS = 3
CONTEXT = 1024
# shape, sequences of a batch, of a microbatch, number format, optimizer, activation checkpointing
SETTINGS = [
    ("gpt2", 8, 8, "bf16", "adamw", "none"),
    ("gpt2", 32, 8, "bf16", "adamw", "none"),
    ("gpt2", 16, 16, "bf16", "muon", "selective"),
    ("gpt2", 32, 32, "bf16", "adamw", "full"),
    ("gpt2", 4, 4, "fp32", "adamw", "none"),
    ("gpt2", 8, 8, "fp16", "lion", "none"),
    ("small", 4, 4, "bf16", "muon", "none"),
    ("small", 16, 16, "bf16", "adamw", "full"),
    ("medium", 4, 2, "bf16", "adamw", "none"),
    ("medium", 8, 8, "bf16", "adafactor", "selective"),
]


def trainings(device: str, *, quick: bool) -> dict[str, Training]:
    """What is measured, in words."""
    found = {}
    for shape, batch, micro, format, optimizer, checkpointing in SETTINGS[:2] if quick else SETTINGS:
        model, vocab_size, context = preset(shape), VOCABULARIES[shape], CONTEXT
        if quick:
            model, vocab_size, context = dataclasses.replace(model, d_model=48, num_layers=1), 256, 32
        words = f"{shape}, {micro} of {batch}, {format}, {optimizer}, checkpointing {checkpointing}"
        found[words] = Training(
            model=model,
            vocab_size=vocab_size,
            seq_len=context,
            batch_size=batch,
            micro_batch_size=micro,
            device=device,  # type: ignore[arg-type]  # one of those there are to choose from
            format=format,  # type: ignore[arg-type]
            optimizer=OPTIMIZERS[optimizer](),
            checkpointing=checkpointing,  # type: ignore[arg-type]
        )
    return found


def train(training: Training) -> int | None:
    """Three steps; returns the microbatch that was left in the end, None if not even one sequence fitted."""
    try:
        step, batch = training.build(), training.random_batch()
        for _ in range(STEPS):
            step(batch, training.lr)
        settle(training.device)
    except torch.OutOfMemoryError:
        return None
    return step.micro_batch_size


def forget(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(training: Training) -> dict[str, float]:
    """Bytes, measured and predicted: of tensors, and of all that the device lends."""
    forget(training.device)
    left = train(training)
    footprint = training.memory.footprint(training.micro_batch_size, training.batch_size)
    parts = footprint.moments[footprint.fullest]
    predicted = {
        "predicted_tensors": footprint.peak - parts.get("program", 0) - parts.get("allocator's gaps", 0),
        "predicted": footprint.peak,
        "fitted": left == training.micro_batch_size,
    }
    if training.device == "cpu":
        return predicted | {"measured": memory_bytes(torch.device("cpu"))}
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return predicted | {
        "measured_tensors": torch.cuda.max_memory_allocated(),
        "measured": torch.cuda.max_memory_reserved() + context,
        "context": context,
    }


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = command_line.parse_args()
    figures: list[Figure] = []
    samples: dict[str, Any] = {}
    tried = trainings(arguments.device, quick=arguments.quick)
    for words, training in tried.items():
        print(words, flush=True)
        measured = samples[words] = measure(training)
        deviation = 100 * (measured["predicted"] / measured["measured"] - 1)
        figures += [
            Figure(name=f"{words}: measured", value=measured["measured"] / 2**30, unit="GiB"),
            Figure(name="  predicted, deviation", value=abs(deviation), unit="%", at_most=MAX_DEVIATION),
        ]
    if arguments.device == "cuda":
        figures.append(Figure(name="said to fit and did not", value=float(_not_fitting(tried, samples)), at_most=0))
    configs = {words: dataclasses.asdict(training) for words, training in tried.items()}
    return publish("gpu_memory", figures, config=configs, samples=samples, quick=arguments.quick)


def _not_fitting(tried: dict[str, Training], samples: dict[str, Any]) -> int:
    """Of the settings with the largest microbatch that should fit, one for each shape and checkpointing."""
    misses = 0
    seen = set()
    for words, training in tried.items():
        kind = words.split(",")[0], training.checkpointing
        if kind in seen:
            continue
        seen.add(kind)
        size = training.memory.largest_micro_batch(torch.cuda.mem_get_info()[1])
        forget(training.device)
        left = train(dataclasses.replace(training, batch_size=size, micro_batch_size=size))
        samples[f"{words}: largest"] = {"said": size, "left": left}
        print(f"{words}: {size} sequences said to fit, {left} did")
        misses += left != size
    return misses


if __name__ == "__main__":
    sys.exit(main())
