"""What lmtrain's training loop costs over a bare loop on the same model, optimizer and batches.

Both loops run in this process and take turns of ten steps, bare, ours, ours, bare, so that a machine that slows
down slows both. Ours is the whole `Trainer.fit`: batches, schedule, finiteness checks, counting, a record every ten
steps to metrics.jsonl and to the progress line; evaluation and checkpoints come after the last timed step. The first
line, a bare loop against another one, shows what the method itself can tell apart.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from report import Figure, median_figure, parser, publish

from lmtrain.config.compose import config_dir, parse_config, register
from lmtrain.config.saved import PRIMARY_CONFIG
from lmtrain.config.schema import ExperimentConfig
from lmtrain.console import ProgressLine
from lmtrain.data.batches import Batch
from lmtrain.data.prepare import prepare
from lmtrain.data.prepared import PreparedData
from lmtrain.hardware import choose_device, set_threads
from lmtrain.model.building import build_model
from lmtrain.run_dir import RunDir
from lmtrain.session import build_session
from lmtrain.tracking.metrics_file import MetricsFile, read_metrics
from lmtrain.training.interrupt import StopRequest
from lmtrain.training.optimizers import build_optimizers
from lmtrain.training.schedules import lr_at
from lmtrain.training.trainer import Batches, Progress

TARGET = 1.03
TURN = 10  # steps: in one turn ours logs one record
BLOCK = 2 * TURN  # steps of either loop between two measurements
WARM_UP = 1  # blocks left out: the optimizers make their state there


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two loops that took turns needed, block by block."""

    first: list[float]  # seconds a step
    second: list[float]

    @property
    def ratios(self) -> list[float]:
        return [second / first for first, second in zip(self.first, self.second, strict=True)]


class BareLoop:
    """Forward, loss, backward, clip, step: what one would write in an afternoon."""

    def __init__(self, config: ExperimentConfig, data: PreparedData, batches: Batches, total_steps: int) -> None:
        torch.manual_seed(config.seed)
        self.model = build_model(
            config.model, vocab_size=data.tokenizer.vocab_size, seq_len=config.data.seq_len, dropout=config.dropout
        )
        self.optimizers = build_optimizers(
            config.optimizer, self.model.parameters(), self.model.block_matrices(), config.lr
        )
        self.config = config
        self.batches = batches
        self.total_steps = total_steps
        self.step = 0
        self.losses: dict[int, float] = {}  # by step, the last of every turn

    def take_turn(self) -> None:
        for _ in range(TURN):
            loss = self.train_on(self.batches[self.step])
        self.losses[self.step] = loss.item()

    def train_on(self, batch: Batch) -> torch.Tensor:
        lr = lr_at(self.config.schedule, self.step, lr=self.config.lr, total_steps=self.total_steps)
        loss = F.cross_entropy(self.model(batch.inputs).flatten(0, 1), batch.targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.trainer.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.trainer.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()


class TurnTaking:
    """Batches for one loop that let another run in between: every block is a turn of it, two of ours, one of it."""

    def __init__(self, batches: Batches, other: Callable[[], None]) -> None:
        self.batches = batches
        self.other = other
        self.other_seconds: list[float] = []  # a block
        self.own_seconds: list[float] = []
        self._opening = 0.0  # seconds of the other's turn that opened this block
        self._started: float | None = None

    def __getitem__(self, step: int) -> Batch:
        if step % BLOCK == 0:
            self._switch(time.perf_counter())
        return self.batches[step]

    def close(self) -> None:
        """No batch is made ahead: the other loop runs where one is asked for."""

    def _switch(self, now: float) -> None:
        if self._started is not None:
            self.own_seconds.append(now - self._started)
            self.other_seconds.append(self._opening + self._time_other())
        self._opening = self._time_other()
        self._started = time.perf_counter()

    def _time_other(self) -> float:
        started = time.perf_counter()
        self.other()
        return time.perf_counter() - started

    def comparison(self) -> Comparison:
        return Comparison(
            first=[seconds / BLOCK for seconds in self.other_seconds[WARM_UP:]],
            second=[seconds / BLOCK for seconds in self.own_seconds[WARM_UP:]],
        )


class Setting:
    """One setting to compare the loops at."""

    def __init__(self, overrides: Sequence[str], folder: Path, blocks: int) -> None:
        self.total_steps = BLOCK * (blocks + WARM_UP) + 1  # the step after the last block ends its measurement
        self.folder = folder
        self.config = resolve(
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
        return BareLoop(self.config, self.data, self.session.batches, self.total_steps)

    def bare_against_bare(self) -> Comparison:
        turns = TurnTaking(self.session.batches, self.bare_loop().take_turn)
        second = self.bare_loop()
        for step in range(self.total_steps):
            second.train_on(turns[step])
        return turns.comparison()

    def ours_against_bare(self) -> tuple[Comparison, float]:
        """Also the largest difference between the losses of both, which shows that they do the same."""
        bare = self.bare_loop()
        turns = TurnTaking(self.session.batches, bare.take_turn)
        metrics = MetricsFile(self.folder / "metrics.jsonl")
        with ProgressLine("", total_steps=self.total_steps, first_step=0) as line, StopRequest() as stop:

            def record(measured: dict[str, float]) -> None:
                complete = measured | {"time": time.time(), "attempt": 0}
                metrics.append(complete)
                line.show(complete)

            trainer = self.session.trainer(RunDir(self.folder), record, Progress())
            trainer.batches = turns
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


def resolve(overrides: Sequence[str]) -> ExperimentConfig:
    """The settings that `python -m lmtrain OVERRIDES` would run with."""
    register()
    with initialize_config_dir(str(config_dir())):
        return parse_config(compose(PRIMARY_CONFIG, list(overrides)))


def write_text(path: Path) -> Path:
    """A text of 65 characters, as many as the Shakespeare one has: how long a step takes depends on nothing else."""
    letters = random.Random(0).choices((string.ascii_letters + string.punctuation)[:65], k=200_000)
    path.write_text("".join(letters), encoding="utf-8")
    return path


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
