"""What `trainer.diagnostics` costs a run of the default model, at its default cadence.

Three runs in this process take turns step by step, in an order that turns too: one plain, another plain one, and one
that looks inside *every* step, so that the cost stands out from the noise; it is then divided by the cadence. The
second plain run shows what the method itself can tell apart. To these come what a run pays once: a matrix product
that is timed for the peak of the processor, and two more pictures at its end.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import Figure, median_figure, parser, publish

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.prepare import prepare
from lmtrain.data.prepared import PreparedData
from lmtrain.hardware import choose_device, set_threads
from lmtrain.session import Session, build_session
from lmtrain.tracking.metrics_file import MetricsFile, read_metrics
from lmtrain.tracking.plots import plot_run
from lmtrain.training.diagnostics import Diagnostics
from lmtrain.training.utilisation import measured_peak

AT_MOST = 1.0  # percent of the time without
ORDERS = list(itertools.permutations(range(3)))  # of the three runs within a round
WARM_UP = len(ORDERS)  # rounds left out: the optimizers make their state there
RUNS_DRAWN = 5  # times the pictures are drawn


class Watched:
    """A run whose every step is looked into, as the trainer does it, metrics file included."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session = session
        self.histograms = folder / "histograms.jsonl"
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.diagnostics = Diagnostics(session.model, histograms=self.histograms)

    def make_step(self, step: int) -> torch.Tensor:
        loss = self.session.step(self.session.batches[step], self.session.config.lr, self.diagnostics).loss
        stand = {"step": step + 1, "tokens": step + 1, "time": time.time(), "attempt": 0}
        self.metrics.append(stand | self.diagnostics.report(step + 1))
        return loss


def plain(session: Session) -> Callable[[int], torch.Tensor]:
    return lambda step: session.step(session.batches[step], session.config.lr).loss


def take_turns(runs: list[Callable[[int], torch.Tensor]], rounds: int) -> tuple[list[list[float]], float]:
    """Seconds of each run's steps; and the largest difference of their losses, which shows that they do the same."""
    seconds: list[list[float]] = [[] for _ in runs]
    difference = 0.0
    for step in range(WARM_UP + rounds):
        losses = {}
        for number in ORDERS[step % len(ORDERS)]:
            started = time.perf_counter()
            losses[number] = runs[number](step).item()
            if step >= WARM_UP:
                seconds[number].append(time.perf_counter() - started)
        difference = max(difference, max(losses.values()) - min(losses.values()))
    return seconds, difference


def time_pictures(folder: Path) -> list[float]:
    """Seconds that drawing takes longer with diagnostics than without, for as many looks as a default run has."""
    records, histograms = read_metrics(folder / "metrics.jsonl"), folder / "histograms.jsonl"
    extra = []
    for _ in range(RUNS_DRAWN):
        started = time.perf_counter()
        plot_run([{"step": 1, "tokens": 1}], folder / "plots")
        between = time.perf_counter()
        plot_run(records, folder / "plots", histograms)
        extra.append(time.perf_counter() - between - (between - started))
    return extra[1:]  # the first loads the library and its fonts


def session_of(config: ExperimentConfig, data: PreparedData) -> Session:
    session = build_session(config, data, choose_device("cpu"))
    session.find_micro_batch_size()
    return session


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=60, help="steps of each run (default 60)")
    command_line.add_argument("overrides", nargs="*", help="settings of the runs, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    rounds = 12 if arguments.quick else arguments.rounds
    config = compose_config(["model=nano", "trainer.diagnostics=true", *arguments.overrides])
    cadence, total_steps = config.trainer.diagnostics_every, config.trainer.max_steps or 1000
    threads = set_threads(config.parallel.num_threads)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["LMTRAIN_CACHE"] = f"{temporary}/cache"
        data = prepare(config.data, config.tokenizer)
        sessions = [session_of(config, data) for _ in range(3)]
        watched = Watched(sessions[2], Path(temporary))
        print(f"{WARM_UP + rounds} steps of {config.batch_size} x {config.data.seq_len} tokens by each of three runs")
        (first, second, looked), difference = take_turns(
            [plain(sessions[0]), plain(sessions[1]), watched.make_step], rounds
        )
        started = time.perf_counter()
        measured_peak(sessions[0].precision.device, sessions[0].precision.format, threads)
        peak_seconds = time.perf_counter() - started
        pictures = time_pictures(Path(temporary))
    step = statistics.median(first)
    extra = [b - a for a, b in zip(first, looked, strict=True)]
    looks = 1 + total_steps // cadence
    once = peak_seconds + statistics.median(pictures)
    whole = (looks * statistics.median(extra) + once) / (total_steps * step)
    figures = [
        median_figure(
            "a plain run beside another",
            [100 * (b - a) / cadence / step for a, b in zip(first, second, strict=True)],
            unit="%",
        ),
        median_figure(
            f"diagnostics every {cadence} steps",
            [100 * seconds / cadence / step for seconds in extra],
            unit="%",
            at_most=AT_MOST,
        ),
        Figure(name=f"in {total_steps} steps, with what is paid once", value=100 * whole, unit="%", at_most=AT_MOST),
        median_figure("a step", [1e3 * seconds for seconds in first], unit="ms"),
        median_figure("looking into one", [1e3 * seconds for seconds in extra], unit="ms"),
        Figure(name="measuring the processor's peak, once", value=1e3 * peak_seconds, unit="ms"),
        Figure(name="two more pictures, once", value=1e3 * statistics.median(pictures), unit="ms"),
        Figure(name="largest difference of the losses", value=difference, unit="nats", at_most=0),
    ]
    samples = {"plain": first, "second plain": second, "looked into": looked, "pictures": pictures}
    return publish(
        "diagnostics_overhead", figures, config=dataclasses.asdict(config), samples=samples, quick=arguments.quick
    )


if __name__ == "__main__":
    sys.exit(main())
