"""What lmtrain's training loop costs over a bare loop on the same model, optimizer and batches.

Both loops take turns of ten steps in this process, bare, ours, ours, bare (`interleaving.py`). Ours is the whole
`Trainer.fit`: batches, schedule, finiteness checks, counting, a record every ten steps to metrics.jsonl and to the
progress line; evaluation and checkpoints come after the last timed step. The first line, a bare loop against another
one, shows what the method itself can tell apart.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bare_loop import BareLoop
from interleaving import WARM_UP, Comparison, Turns, in_turns
from report import Figure, median_figure, parser, publish
from texts import write_text

from lmtrain.config.compose import compose_config
from lmtrain.console import ProgressLine
from lmtrain.data.batches import Batch, TrainBatches
from lmtrain.data.prepare import prepare
from lmtrain.hardware import choose_device, set_threads
from lmtrain.run_dir import RunDir
from lmtrain.session import build_session
from lmtrain.tracking.metrics_file import MetricsFile, read_metrics
from lmtrain.training.interrupt import StopRequest
from lmtrain.training.trainer import Progress

TARGET = 1.02
TURN = 10  # steps: in one turn ours logs one record
BLOCK = 2 * TURN  # steps of either loop between two measurements


class BatchesInTurns:
    """Batches for a loop that owns its pace: where it asks for the first of a block, the other one takes its turns."""

    def __init__(self, batches: TrainBatches, turns: Turns) -> None:
        self.batches = batches
        self.turns = turns

    def __getitem__(self, step: int) -> Batch:
        if step % BLOCK == 0:
            self.turns.switch()
        return self.batches[step]

    def close(self) -> None:
        """No batch is made ahead: the other loop runs where one is asked for."""


class Setting:
    """One setting to compare the loops at."""

    def __init__(self, overrides: Sequence[str], folder: Path, blocks: int) -> None:
        self.total_steps = BLOCK * (blocks + WARM_UP) + 1  # the step after the last block ends its measurement
        self.blocks = blocks
        self.folder = folder
        self.config = compose_config(
            [
                *overrides,
                f"trainer.max_steps={self.total_steps}",
                f"trainer.eval_every={self.total_steps}",
                "trainer.eval_batches=1",
            ]
        )
        set_threads(self.config.parallel.num_threads)
        self.data = prepare(self.config.data, self.config.tokenizer)
        self.session = build_session(self.config, self.data, choose_device("cpu"))

    def bare_loop(self) -> BareLoop:
        return BareLoop(self.session.config, self.data.tokenizer.vocab_size, self.session.batches, self.total_steps)

    def bare_against_bare(self) -> Comparison:
        return in_turns(self.bare_loop(), self.bare_loop(), turn=TURN, blocks=self.blocks)

    def ours_against_bare(self) -> tuple[Comparison, float]:
        """Also the largest difference between the losses of both, which shows that they do the same."""
        bare = self.bare_loop()
        turns = Turns(bare, turn=TURN)
        metrics = MetricsFile(self.folder / "metrics.jsonl")
        with ProgressLine("", total_steps=self.total_steps, first_step=0) as line, StopRequest() as stop:

            def record(measured: dict[str, float]) -> None:
                complete = measured | {"time": time.time(), "attempt": 0}
                metrics.append(complete)
                line.show(complete)

            trainer = self.session.trainer(RunDir(self.folder), record, Progress())
            trainer.batches = BatchesInTurns(self.session.batches, turns)
            if trainer.fit(stop) != "completed":
                sys.exit("the run did not complete")
        metrics.close()
        ours = {int(r["step"]): r["train/loss"] for r in read_metrics(metrics.path) if "train/loss" in r}
        return turns.comparison(), max(abs(ours[step] - bare.losses[step]) for step in ours.keys() & bare.losses.keys())

    def batch_milliseconds(self) -> float:
        """Of `batches[step]` alone; both loops spend it."""
        batches, seconds = self.session.batches, []
        for step in range(200):
            started = time.perf_counter()
            batches[step]
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds) * 1e3


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--blocks", type=int, default=30, help="measurements a line (default 30)")
    command_line.add_argument("overrides", nargs="*", help="settings for both, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    blocks = 1 if arguments.quick else arguments.blocks
    figures, samples, configs = [], {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["LMTRAIN_CACHE"] = f"{temporary}/cache"
        text = write_text(Path(temporary) / "text.txt")
        settings = {
            "default": ["model=nano"],
            "shakespeare": ["experiment=shakespeare_char", f"data.path='{text}'"],
        }
        for name, overrides in settings.items():
            folder = Path(temporary) / name
            folder.mkdir()
            setting = Setting([*overrides, *arguments.overrides], folder, blocks)
            size = f"{setting.config.batch_size} x {setting.config.data.seq_len} tokens"
            print(f"{name}: {setting.total_steps} steps of {size} by each loop, twice")
            control = setting.bare_against_bare()
            compared, difference = setting.ours_against_bare()
            figures += [
                median_figure(f"{name}: bare / bare", control.ratios),
                median_figure(f"{name}: lmtrain / bare", compared.ratios, at_most=TARGET),
                median_figure(f"{name}: bare loop", [1e3 * s for s in compared.first], unit="ms a step"),
                median_figure(f"{name}: lmtrain", [1e3 * s for s in compared.second], unit="ms a step"),
                Figure(name=f"{name}: batch alone, in both", value=setting.batch_milliseconds(), unit="ms a step"),
                Figure(name=f"{name}: largest difference of the losses", value=difference, unit="nats"),
            ]
            samples[name] = {"bare/bare": dataclasses.asdict(control), "lmtrain/bare": dataclasses.asdict(compared)}
            configs[name] = dataclasses.asdict(setting.config)
    return publish("step_overhead", figures, config=configs, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
