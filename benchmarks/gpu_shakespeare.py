"""Tinyshakespeare by characters at the 10.65 M setting on one GPU: how long until the validation loss is 1.47.

6 layers, width 384, 6 heads, context 256, batches of 64, dropout 0.2; the last tenth validates, all of it. The time is
that of this program, from before it imports PyTorch to the end of the evaluation that reached the loss; reading,
compiling and evaluating count. Needs nothing but PyTorch and PyYAML. `--quick` makes a few steps of a tiny model.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import dataclasses  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from report import Figure, median_figure, parser, publish  # noqa: E402
from without_hydra import Training, preset, settle  # noqa: E402

from lmtrain.config.schema import MuonConfig, WarmupStableDecayConfig  # noqa: E402
from lmtrain.data.batches import Source  # noqa: E402
from lmtrain.data.documents import Documents  # noqa: E402
from lmtrain.data.packed import PackedBatches, PackedEvalBatches  # noqa: E402
from lmtrain.data.prefetch import Prefetched  # noqa: E402
from lmtrain.training.evaluation import evaluate  # noqa: E402
from lmtrain.training.schedules import lr_at  # noqa: E402

MAX_LOSS, MAX_SECONDS = 1.47, 60.0
EVALUATIONS = 8
SCHEDULE = WarmupStableDecayConfig(decay_fraction=0.6)


def read(path: Path) -> tuple[Documents, Documents, int]:
    """Training and validation characters as ids, and how many there are."""
    text = path.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    numbers = {character: number for number, character in enumerate(alphabet)}
    ids = np.array([numbers[character] for character in text], dtype=np.uint16)
    parts = np.split(ids, [int(0.9 * len(ids))])
    train, val = (Documents(tokens=part, ends=np.array([len(part)])) for part in parts)
    return train, val, len(alphabet)


def train_once(training: Training, data: tuple[Documents, Documents], *, seed: int, steps: int) -> dict[str, Any]:
    """Losses of the evaluations and when they ended, in seconds since this began."""
    began = time.perf_counter()
    step = training.build(seed)
    batches = Prefetched(
        PackedBatches([Source(data[0])], seq_len=training.seq_len, batch_size=training.batch_size, seed=seed),
        num_steps=steps,
        pin_memory=training.device == "cuda",
    )
    held_out = PackedEvalBatches([Source(data[1])], seq_len=training.seq_len, batch_size=training.batch_size)
    losses, seconds = [], []
    for number in range(steps):
        step(batches[number], lr_at(SCHEDULE, number, lr=training.lr, total_steps=steps))
        if (number + 1) % max(1, steps // EVALUATIONS) == 0 or number + 1 == steps:
            measured = evaluate(
                step.model,
                held_out,
                step.precision,
                bytes_per_token=1.0,
                forward=step.forward,  # type: ignore[arg-type]
            )
            losses.append(measured["val/loss"])
            seconds.append(time.perf_counter() - began)
            print(f"step {number + 1}/{steps}  val loss {losses[-1]:.4f}  {seconds[-1]:.1f} s", flush=True)
    settle(training.device)
    batches.close()
    return {"losses": losses, "seconds": seconds}


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("path", type=Path, help="the text: tinyshakespeare's input.txt")
    command_line.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    command_line.add_argument("--seeds", type=int, default=3, help="runs (default 3)")
    command_line.add_argument("--steps", type=int, default=2000, help="of each run (default 2,000)")
    command_line.add_argument("--lr", type=float, default=0.004)
    command_line.add_argument("--compile", action="store_true", help="which takes some of the time, and may save more")
    arguments = command_line.parse_args()
    train, val, vocab_size = read(arguments.path)
    training = Training(
        model=dataclasses.replace(preset("nano"), d_model=384, num_layers=6, num_heads=6),
        vocab_size=vocab_size,
        seq_len=256,
        batch_size=64,
        micro_batch_size=64,
        device=arguments.device,
        optimizer=MuonConfig(),
        dropout=0.2,
        compile=arguments.compile,
        lr=arguments.lr,
    )
    seeds, steps = arguments.seeds, arguments.steps
    if arguments.quick:
        tiny = dataclasses.replace(training.model, d_model=32, num_layers=1, num_heads=2)
        training = dataclasses.replace(training, model=tiny, seq_len=64, batch_size=4, micro_batch_size=4)
        seeds, steps = 1, 4
    before = time.perf_counter() - STARTED
    runs = [train_once(training, (train, val), seed=seed, steps=steps) for seed in range(seeds)]
    reached = [
        before + next((s for loss, s in zip(run["losses"], run["seconds"], strict=True) if loss <= MAX_LOSS), np.inf)
        for run in runs
    ]
    figures = [
        Figure(
            name="best validation loss, worst seed", value=max(min(run["losses"]) for run in runs), at_most=MAX_LOSS
        ),
        Figure(name=f"time to {MAX_LOSS}, slowest seed", value=max(reached), unit="s", at_most=MAX_SECONDS),
        median_figure("best validation loss", [min(run["losses"]) for run in runs], unit="nats"),
        Figure(name="imports and reading", value=before, unit="s"),
    ]
    config = dataclasses.asdict(training) | {"schedule": dataclasses.asdict(SCHEDULE), "steps": steps}
    return publish("gpu_shakespeare", figures, config=config, samples={"runs": runs}, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
