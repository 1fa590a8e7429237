"""How long a checkpoint keeps training waiting, over a plain copy of the same bytes in host memory.

The stall is the time from taking the state (`capture`) until `CheckpointWriter.save` returns, with no other write going
on. The peer is one `copy_` of as many bytes into memory that was written before; both take turns in one process, with
the same threads. The first checkpoint of a run has buffers to fill that the run made ready in the background after its
first step; it is measured in new processes, with and without that. Then training steps are timed while the thread
writes (serialise, sha256, fsync) and while it does not, and a checkpoint that comes while one is being written, which
waits for it. The model has 12.6 M parameters under AdamW: 151 MB of weights and moments.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from report import Figure, median_figure, parser, publish
from texts import write_text

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.prepare import prepare
from lmtrain.hardware import set_threads
from lmtrain.session import Session, build_session
from lmtrain.training.checkpoint import Checkpoint, CheckpointFolder, capture
from lmtrain.training.checkpoint_writer import CheckpointWriter

TARGET = 1.3
SETTINGS = [
    *("data=text", "tokenizer=char", "data.seq_len=64", "batch_size=2", "trainer.max_steps=1000", "optimizer=adamw"),
    *("model.d_model=512", "model.num_layers=4", "model.num_heads=8", "precision=fp32", "device=cpu"),
]


class Run:
    """A run after its first step, which never ends."""

    def __init__(self, overrides: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.config = compose_config([*SETTINGS, f"data.path={write_text(folder / 'input.txt')}", *overrides])
        self.session = self._build(self.config)
        self.steps = 0
        self.step()
        self.megabytes = sum(tensor.nbytes for tensor in all_tensors(self.capture())) / 1e6

    def _build(self, config: ExperimentConfig) -> Session:
        set_threads(config.parallel.num_threads)
        data = prepare(config.data, config.tokenizer)
        return build_session(config, data, torch.device("cpu"))

    def step(self) -> float:
        """Make a step; returns its seconds."""
        started = time.perf_counter()
        self.session.step(self.session.batches[self.steps], self.config.lr)
        self.steps += 1
        return time.perf_counter() - started

    def capture(self) -> Checkpoint:
        return capture(self.session.model, self.session.step.optimizers, self.session.step.scaler, {"step": self.steps})

    def writer(self) -> CheckpointWriter:
        return CheckpointWriter(CheckpointFolder(self.folder / "checkpoints", keep=2).save)

    def written(self, step: int) -> bool:
        """Whether the checkpoint of a step is in its place."""
        return (self.folder / "checkpoints" / f"step_{step:08d}").is_dir()

    def stall(self, writer: CheckpointWriter) -> float:
        """Seconds that a checkpoint keeps the calling thread; the writing goes on behind it."""
        started = time.perf_counter()
        writer.save(self.capture(), step=self.steps)
        return time.perf_counter() - started


class PlainCopy:
    """Copies as many bytes as a checkpoint has, in one piece."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        size = sum(tensor.nbytes for tensor in all_tensors(checkpoint))
        self.source, self.target = torch.ones(size // 4), torch.zeros(size // 4)
        self.seconds()

    def seconds(self) -> float:
        started = time.perf_counter()
        self.target.copy_(self.source)
        return time.perf_counter() - started


def all_tensors(checkpoint: Checkpoint) -> list[torch.Tensor]:
    return [*checkpoint.model.values(), *checkpoint.state.values()]


def later_stalls(run: Run, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of plain copies and of checkpoints, by turns: copy, checkpoint, copy; the mean of both copies counts."""
    writer, copy = run.writer(), PlainCopy(run.capture())
    run.stall(writer)
    writer.wait()
    copies, stalls = [], []
    for _ in range(rounds):
        run.step()
        before = copy.seconds()
        run.step()
        stalls.append(run.stall(writer))
        writer.wait()
        run.step()
        copies.append((before + copy.seconds()) / 2)
    return copies, stalls


def first_stall(overrides: list[str], ready: bool) -> tuple[float, float]:
    """Seconds of a plain copy and of a run's first checkpoint, its buffers made ready before or not."""
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(overrides, Path(temporary))
        writer = run.writer()
        if ready:
            writer.prepare(run.capture())
        for _ in range(5):
            run.step()
        stall = run.stall(writer)
        writer.wait()
        copy = PlainCopy(run.capture())
        return statistics.median(copy.seconds() for _ in range(5)), stall


def while_writing(run: Run, rounds: int) -> dict[str, list[float]]:
    """Seconds of steps alone and during writes, of whole writes, and of a stall that has a write to wait for."""
    writer = run.writer()
    run.stall(writer)
    writer.wait()
    measured: dict[str, list[float]] = {"alone": [], "during": [], "writes": [], "waiting": []}
    for _ in range(rounds):
        measured["alone"] += [run.step() for _ in range(5)]
        saved, steps = run.steps, []
        run.stall(writer)
        started = time.perf_counter()
        while not run.written(saved):
            steps.append(run.step())
        measured["writes"].append(time.perf_counter() - started)
        measured["during"] += steps[:-1]  # in the last the write ended
        run.stall(writer)
        measured["waiting"].append(run.stall(writer))
        writer.wait()
    return measured


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=30, help="checkpoints measured (default 30)")
    command_line.add_argument("overrides", nargs="*", help="settings, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    rounds, starts = (3, 1) if arguments.quick else (arguments.rounds, 7)
    samples: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh_process:
        for name, ready in (("first, ready", True), ("first, not ready", False)):
            pairs = fresh_process.starmap(first_stall, [(arguments.overrides, ready)] * starts, chunksize=1)
            samples[name] = [stall / copy for copy, stall in pairs]
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(arguments.overrides, Path(temporary))
        copies, stalls = later_stalls(run, rounds)
        samples |= {"copies": copies, "stalls": stalls} | while_writing(run, max(2, rounds // 3))
    alone = statistics.median(samples["alone"])
    figures = [
        Figure(name="bytes of a checkpoint", value=run.megabytes, unit="MB"),
        median_figure("a plain copy of them", [1e3 * seconds for seconds in copies], unit="ms"),
        median_figure("stall / plain copy", [a / b for a, b in zip(stalls, copies, strict=True)], at_most=TARGET),
        median_figure("the first checkpoint's", samples["first, ready"], at_most=TARGET),
        median_figure("the first one's, had its buffers not been made ready", samples["first, not ready"]),
        median_figure("writing it, in the background", samples["writes"], unit="s"),
        median_figure("stall when the one before is still being written", samples["waiting"], unit="s"),
        median_figure("step while writing / step alone", [seconds / alone for seconds in samples["during"]]),
    ]
    config = asdict(run.config)
    return publish("checkpoint_stall", figures, config=config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
