"""How fast batches are read from prepared tokens, how long the first one takes, and what training waits for them.

Reading: `batches[step]` of 32 sequences of 1,024 tokens, in this thread, from 100 M tokens on disk in documents of 500
tokens in the mean; inputs a second, where padding does not count. The first batch: everything from the
open arrays on, for three sizes of a corpus; the tokens of a large one are a hole in a file, its document ends are not.
Waiting: the default model is trained by `Trainer.fit`, which makes the next batch in a thread; its wait is the time in
`batches[step]`, over the time of the step. The same without the thread shows what that is worth.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from report import Figure, median_figure, median_interval, parser, publish

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.batches import Batch, Source, TrainBatches
from lmtrain.data.documents import Documents
from lmtrain.data.packed import PackedBatches
from lmtrain.data.padded import DocumentRows, PaddedBatches
from lmtrain.data.prepare import prepare
from lmtrain.hardware import choose_device, set_threads
from lmtrain.run_dir import RunDir
from lmtrain.session import build_session
from lmtrain.training.interrupt import StopRequest
from lmtrain.training.trainer import Batches, Progress

MIN_SPEED, MAX_START, MAX_WAIT = 20.0, 0.3, 0.5  # million tokens a second; seconds; percent of a step
SEQ_LEN, BATCH_SIZE, MEAN_LENGTH, VOCABULARY = 1024, 32, 500, 4096
TURN = 64  # batches a sample of the reading speed
TOKENS_READ = 100_000_000
SIZES = (10**6, 10**8, 10**10)  # tokens of the corpora whose first batch is timed
KINDS = ("packed", "packed_documents", "padded")


def write_corpus(folder: Path, num_tokens: int, *, hole: bool) -> Documents:
    """Documents of a skewed distribution of lengths; with `hole` all tokens are 0 and take no room on the disk."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(MEAN_LENGTH) - 0.5, 1.0, int(1.2 * num_tokens / MEAN_LENGTH) + 100)
    ends = np.cumsum(np.maximum(lengths, 2).astype(np.int64))
    ends = ends[: int(ends.searchsorted(num_tokens))]
    tokens_path, ends_path = folder / f"{num_tokens}.tokens", folder / f"{num_tokens}.ends"
    ends.tofile(ends_path)
    if hole:
        tokens_path.touch()
        os.truncate(tokens_path, 2 * int(ends[-1]))
    else:
        generator.integers(0, VOCABULARY, int(ends[-1]), dtype=np.uint16).tofile(tokens_path)
    return Documents(np.memmap(tokens_path, np.uint16, "r"), np.memmap(ends_path, np.int64, "r"))


def half_counted(documents: Documents) -> Documents:
    """The same, where only the second half of each document is a target."""
    prompts = documents.lengths // 2
    changes = np.zeros(len(documents.tokens), np.int8)
    changes[documents.starts(np.arange(len(documents))) + prompts] = 1
    changes[documents.ends[:-1]] -= 1
    return dataclasses.replace(documents, counted=changes.cumsum(dtype=np.int8) > 0, prompts=prompts)


def batches_of(kind: str, sources: Sequence[Source], seed: int = 0) -> TrainBatches:
    if kind == "padded":
        rows = DocumentRows(sources, seq_len=SEQ_LEN, split="training")
        return PaddedBatches(rows, [source.weight for source in sources], batch_size=BATCH_SIZE, seed=seed)
    separate = kind == "packed_documents"
    return PackedBatches(sources, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, seed=seed, separate_documents=separate)


def reading_speeds(batches: TrainBatches, samples: int) -> tuple[list[float], float]:
    """Million inputs a second, sample by sample; and the share of padding in the batches."""
    speeds, tokens, room = [], 0, 0
    for sample in range(samples + 1):
        steps = range(sample * TURN, (sample + 1) * TURN)
        started = time.perf_counter()
        room += sum(batches[step].inputs.numel() for step in steps)
        seconds = time.perf_counter() - started
        read = sum(int(batches.rows(step).lengths.sum()) for step in steps)
        tokens += read
        speeds.append(read / seconds / 1e6)
    return speeds[1:], 1 - tokens / room  # the first reads from the disk


def first_batch_seconds(kind: str, documents: Documents, tries: int) -> list[float]:
    seconds = []
    for seed in range(tries):
        started = time.perf_counter()
        batches_of(kind, [Source(documents)], seed)[0]
        seconds.append(time.perf_counter() - started)
    return seconds


class Waited:
    """Batches that note when each was asked for and how long that took."""

    def __init__(self, batches: Batches | TrainBatches, close: Callable[[], None]) -> None:
        self.batches = batches
        self.close = close
        self.asked: list[float] = []
        self.waits: list[float] = []

    def __getitem__(self, step: int) -> Batch:
        started = time.perf_counter()
        batch = self.batches[step]
        self.asked.append(started)
        self.waits.append(time.perf_counter() - started)
        return batch

    def shares(self) -> list[float]:
        """Percent of each step between the second and the last: before the first, none could be made ready."""
        steps = np.diff(self.asked)
        return (100 * np.array(self.waits[1:-1]) / steps[1:]).tolist()


def train(config: ExperimentConfig, folder: Path, *, ahead: bool) -> Waited:
    """A run of the default model; `ahead`: as it is, else with every batch made when it is asked for."""
    session = build_session(config, prepare(config.data, config.tokenizer), choose_device("cpu"))
    trainer = session.trainer(RunDir(folder), lambda measured: None, Progress())
    waited = Waited(trainer.batches if ahead else session.batches, trainer.batches.close)
    trainer.batches = waited
    with StopRequest() as stop:
        if trainer.fit(stop) != "completed":
            sys.exit("the run did not complete")
    return waited


def reading_figures(folder: Path, samples: int) -> tuple[list[Figure], dict[str, list[float]]]:
    documents = write_corpus(folder, TOKENS_READ, hole=False)
    mixture = [Source(documents, weight) for weight in (0.5, 0.3, 0.2)]
    read: dict[str, TrainBatches] = {kind: batches_of(kind, [Source(documents)]) for kind in KINDS}
    read["packed, a mixture of three"] = batches_of("packed", mixture)
    read["padded, half of the tokens count"] = batches_of("padded", [Source(half_counted(documents))])
    figures, measured = [], {}
    for name, batches in read.items():
        speeds, padding = reading_speeds(batches, samples)
        measured[f"reading, {name}"] = speeds
        middle = float(np.median(speeds))
        interval = median_interval(speeds)
        figures.append(
            Figure(name=f"reading, {name}", value=middle, unit="M tokens/s", interval=interval, at_least=MIN_SPEED)
        )
        if name == "padded":
            figures.append(Figure(name="... padding in its batches", value=100 * padding, unit="%"))
    return figures, measured


def first_batch_figures(folder: Path, tries: int) -> tuple[list[Figure], dict[str, list[float]]]:
    figures, measured = [], {}
    for size in SIZES:
        documents = write_corpus(folder, size, hole=True)
        for kind in KINDS:
            name = f"first batch, {kind}, of {size / 1e6:,.0f} M tokens, {len(documents):,} documents"
            measured[name] = first_batch_seconds(kind, documents, tries)
            figures.append(median_figure(name, measured[name], unit="s", at_most=MAX_START))
    return figures, measured


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--steps", type=int, default=60, help="steps of each run of the model (default 60)")
    command_line.add_argument("overrides", nargs="*", help="settings of the runs, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    steps, samples, tries = (4, 2, 1) if arguments.quick else (arguments.steps, 20, 7)
    budget = [f"trainer.max_steps={steps}", f"trainer.eval_every={steps}", "trainer.eval_batches=1"]
    configs = {
        kind: compose_config(["model=nano", f"data.batches={kind}", *budget, *arguments.overrides]) for kind in KINDS
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["LMTRAIN_CACHE"] = f"{temporary}/cache"
        figures, measured = reading_figures(folder, samples)
        first_figures, seconds = first_batch_figures(folder, tries)
        figures += first_figures
        measured |= seconds
        for kind, config in configs.items():
            set_threads(config.parallel.num_threads)
            ahead = train(config, folder / f"{kind}-ahead", ahead=True).shares()
            without = train(config, folder / f"{kind}-without", ahead=False).shares()
            measured |= {f"wait, {kind}": ahead, f"wait, {kind}, without a thread": without}
            figures.append(median_figure(f"wait for batches, {kind}", ahead, unit="% of a step", at_most=MAX_WAIT))
            figures.append(
                Figure(name="... its mean", value=float(np.mean(ahead)), unit="% of a step", at_most=MAX_WAIT)
            )
            figures.append(median_figure("... without a thread", without, unit="% of a step"))
    content = {kind: dataclasses.asdict(config) for kind, config in configs.items()}
    return publish("data_reading", figures, config=content, samples=measured, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
