"""Tinyshakespeare by characters: how long until the validation loss is 1.88, and how long a minimal GPT takes.

Ours is the whole program, `python -m lmtrain experiment=shakespeare_char`, in a folder of its own with an empty cache:
the time runs from its start to the record of `metrics.jsonl` with the first evaluation, over the whole last tenth, that
is at most 1.88. Imports, preparing the text and all evaluations count.

The minimal GPT (`minimal_gpt.py`) is at the setting that is on record with a loss of 1.886 after 2,000 steps, in 104 s
where a step took 40 ms. Before, between and after our runs it trains for a while in this process, which gives the time
a step takes it now: its time to the loss is 104 s × that / 40 ms. `--reference` makes its 2,000 steps and evaluates, to
see what this machine says to the loss on record.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minimal_gpt
import numpy as np
import yaml
from minimal_gpt import MinimalLoop
from numpy.typing import NDArray
from report import Figure, median_figure, parser, publish, run_lmtrain

from lmtrain.run_dir import RunDir
from lmtrain.tracking.metrics_file import read_metrics

MAX_LOSS, MAX_RATIO = 1.88, 0.25
REFERENCE_LOSS, REFERENCE_SECONDS, REFERENCE_STEP = 1.886, 104.0, 0.040


@dataclass(frozen=True, kw_only=True)
class OurRun:
    """What a run of the experiment came to."""

    loss: float  # of the first evaluation that reached the target, or of the last
    seconds: float | None  # of the whole program until then; None: never
    final_loss: float
    training_seconds: float  # evaluation, checkpoints and the sample not counted
    wall_seconds: float  # of the whole program, to its end
    config: dict[str, Any]


def run_ours(path: Path, seed: int, overrides: list[str], temporary: Path) -> OurRun:
    """One run in an empty folder, its data not prepared."""
    cwd = temporary / f"seed_{seed}"
    cwd.mkdir()
    folder = RunDir(cwd / "run")
    words = ["experiment=shakespeare_char", f"data.path='{path.resolve()}'", f"seed={seed}", *overrides]
    began = time.time()
    wall = run_lmtrain([*words, f"hydra.run.dir='{folder.path}'"], folder=cwd, cache=cwd / "cache")
    result = folder.read_result()
    assert result is not None
    evaluated = [record for record in read_metrics(folder.metrics) if "val/loss" in record]
    reached = next((record for record in evaluated if record["val/loss"] <= MAX_LOSS), None)
    return OurRun(
        loss=(reached or evaluated[-1])["val/loss"],
        seconds=None if reached is None else reached["time"] - began,
        final_loss=result["metrics"]["val/loss"],
        training_seconds=result["training_seconds"],
        wall_seconds=wall,
        config=yaml.safe_load(folder.config.read_text(encoding="utf-8")),
    )


def summarize(ours: list[OurRun], step_seconds: list[list[float]]) -> list[Figure]:
    """The figures of our runs and, for each of them, the step times of the minimal GPT around it."""
    references = [REFERENCE_SECONDS * statistics.median(seconds) / REFERENCE_STEP for seconds in step_seconds]
    seconds = [float("inf") if run.seconds is None else run.seconds for run in ours]
    ratios = [own / reference for own, reference in zip(seconds, references, strict=True)]
    return [
        Figure(name="validation loss then, worst seed", value=max(r.loss for r in ours), unit="nats", at_most=MAX_LOSS),
        Figure(name="time to it / the minimal GPT's, slowest seed", value=max(ratios), at_most=MAX_RATIO),
        median_figure("time to it / the minimal GPT's", ratios),
        median_figure("time to it, whole program", seconds, unit="s"),
        median_figure("... of which training, at the end", [run.training_seconds for run in ours], unit="s"),
        median_figure("whole program to its end", [run.wall_seconds for run in ours], unit="s"),
        median_figure("validation loss at the end", [run.final_loss for run in ours], unit="nats"),
        median_figure("minimal GPT", [1e3 * s for some in step_seconds for s in some], unit="ms a step"),
        median_figure(f"minimal GPT, time to {REFERENCE_LOSS} by its record", references, unit="s"),
    ]


def train_reference(train: NDArray[np.uint16], val: NDArray[np.uint16], vocab_size: int) -> list[Figure]:
    """The minimal GPT trained to its end."""
    reference = MinimalLoop(minimal_gpt.Shape(vocab_size=vocab_size), train)
    seconds = sum(reference.timed(minimal_gpt.TOTAL_STEPS))
    return [
        Figure(name=f"minimal GPT, loss (on record: {REFERENCE_LOSS})", value=reference.loss_over(val), unit="nats"),
        Figure(name="minimal GPT, 2,000 steps", value=seconds, unit="s"),
    ]


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("path", type=Path, help="the text: tinyshakespeare's input.txt")
    command_line.add_argument("--seeds", type=int, default=3, help="runs, with seeds from 0 (default 3)")
    command_line.add_argument("--steps", type=int, default=200, help="of the minimal GPT around each run (default 200)")
    command_line.add_argument("--reference", action="store_true", help="train the minimal GPT to its end as well")
    command_line.add_argument("overrides", nargs="*", help="settings for our runs, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    seeds, half, words = arguments.seeds, arguments.steps // 2, list(arguments.overrides)
    if arguments.quick:
        seeds, half = 1, 5
        words = ["trainer.max_steps=20", "trainer.eval_every=20", "trainer.eval_batches=2", *words]

    text = arguments.path.read_text(encoding="utf-8")
    numbers = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = np.array([numbers[character] for character in text], dtype=np.uint16)
    train, val = np.split(ids, [int(0.9 * len(ids))])
    minimal = MinimalLoop(minimal_gpt.Shape(vocab_size=len(numbers)), train)
    minimal(5)  # the first steps set up memory and the optimizer's state
    step_seconds: list[list[float]] = []
    ours: list[OurRun] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(seeds):
            before = minimal.timed(half)
            ours.append(run_ours(arguments.path, seed, words, Path(temporary)))
            step_seconds.append(before + minimal.timed(half))
            print(f"seed {seed}: loss {ours[-1].loss:.4f} after {ours[-1].seconds or float('inf'):.1f} s", flush=True)

    figures = summarize(ours, step_seconds)
    if arguments.reference:
        figures += train_reference(train, val, len(numbers))
    samples = {
        "loss": [run.loss for run in ours],
        "seconds_to_loss": [run.seconds for run in ours],
        "final_loss": [run.final_loss for run in ours],
        "training_seconds": [run.training_seconds for run in ours],
        "wall_seconds": [run.wall_seconds for run in ours],
        "minimal_gpt_step_seconds": step_seconds,
    }
    return publish("time_to_loss", figures, config=ours[0].config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
