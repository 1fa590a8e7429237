"""What a person sees of a run: how it begins, a progress line on a terminal or periodic lines elsewhere, its end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sys
import textwrap
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from lmtrain.data.prepared import PreparedData
    from lmtrain.run import RunResult
    from lmtrain.run_dir import RunDir
    from lmtrain.session import Session

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""How often a log file hears of a run between evaluations."""

_FINAL = ("val/loss", "val/perplexity", "val/bits_per_byte")


def announce(session: Session, data: PreparedData, folder: RunDir) -> None:
    """Say what is about to be trained on what, and where."""
    splits = [data.documents(split) for split in ("train", "val")]
    log.info(
        "data    %s: %d + %d documents, %.2f + %.2f M tokens (training + validation), vocabulary %d, %s",
        data.name,
        *(sum(map(len, documents)) for documents in splits),
        *(sum(len(one.tokens) for one in documents) / 1e6 for documents in splits),
        data.tokenizer.vocab_size,
        "prepared now" if data.sources[0].built else "prepared before",
    )
    for source in data.sources:
        for reason, count in source.left_out.items():
            if count:
                log.info("left out of %s: %d documents: %s", source.name, count, reason)
    log.info(
        "model   %.2f M parameters on %s%s in %s; %d steps of %d x %d tokens",
        session.num_parameters / 1e6,
        f"{session.team.size} x " if session.team.has_others else "",
        session.precision.device,
        session.precision.name,
        session.total_steps,
        session.config.batch_size,
        session.config.data.seq_len,
    )
    if session.model_choice:
        log.info("auto    %s", session.model_choice)
    if session.precision.reason:
        log.info("format  %s: %s", session.precision.name, session.precision.reason)
    log.info("folder  %s", folder)


class ProgressLine:
    """Shows the records of a run as they come; use as a context manager."""

    def __init__(self, label: str, *, total_steps: int, first_step: int, bar: bool = True) -> None:
        """`label` tells the runs of a multirun apart. Worker processes share a terminal, so they write lines."""
        self.label = label
        self.total_steps = total_steps
        self.terminal = bar and sys.stderr.isatty() and multiprocessing.parent_process() is None
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not self.terminal,
            dynamic_ncols=True,
            bar_format="{desc}{n_fmt}/{total_fmt} |{bar:20}| {elapsed}<{remaining}{postfix}",
            desc=f"{label} " if label else "",
        )
        self._stack = contextlib.ExitStack()
        self._shown: dict[str, float] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> ProgressLine:
        if self.terminal:
            from tqdm.contrib.logging import logging_redirect_tqdm  # in a notebook it warns of widgets it does not find

            self._stack.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._stack.close()

    def show(self, record: Mapping[str, float]) -> None:
        """Take a record of metrics."""
        self._shown |= record
        step = int(record["step"])
        if "val/loss" in record:
            bits = record.get("val/bits_per_byte")  # absent where ids stand for no text
            self._line(f"val loss {record['val/loss']:.4f}" + (f"  bits/byte {bits:.4f}" if bits is not None else ""))
        elif (
            "train/loss" in record and not self.terminal and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        ):
            self._line(f"loss {record['train/loss']:.4f}")
        postfix = {name: value for name, value in self._headline().items() if value}
        self._bar.set_postfix_str("".join(f"{name} {value}  " for name, value in postfix.items()), refresh=False)
        self._bar.update(step - self._bar.n)

    def _line(self, what: str) -> None:
        name = f"{self.label} " if self.label else ""
        width, speed = len(str(self.total_steps)), self._headline()["tok/s"]
        log.info("%sstep %*d/%d  %s  %s tok/s", name, width, self._shown["step"], self.total_steps, what, speed)
        self._last_line = time.monotonic()

    def _headline(self) -> dict[str, str]:
        shown = self._shown
        return {
            "loss": f"{shown['train/loss']:.3f}" if "train/loss" in shown else "",
            "val": f"{shown['val/loss']:.3f}" if "val/loss" in shown else "",
            "tok/s": f"{shown['train/tokens_per_second']:,.0f}" if "train/tokens_per_second" in shown else "",
        }


def show_end(folder: RunDir, result: RunResult, objective: str, training_seconds: float) -> None:
    """Show the sample, if there is one, and the numbers of a run that went to its end."""
    if folder.sample.exists():
        sample = folder.sample.read_text(encoding="utf-8").strip("\n")
        log.info(
            "\nsample: some validation text, then the model's own\n%s",
            textwrap.indent(sample, "  | ", lambda line: True),
        )
    log.info("\n%s", _final_table(result, objective, training_seconds))


def _final_table(result: RunResult, objective: str, training_seconds: float) -> str:
    """Lines of a name, the last value, and where there is one the best."""
    best = "" if result.objective is None else f"{result.objective:.4f} at step {result.best_step}"
    measured = [name for name in dict.fromkeys([*_FINAL, objective]) if name in result.metrics]
    rows = [
        (result.status.replace("_", " "), "last", "best"),
        *((f"  {name}", _final(name, result.metrics[name]), best if name == objective else "") for name in measured),
        ("  steps", f"{result.step}", ""),
        ("  tokens", f"{result.tokens / 1e6:.2f} M", ""),
        ("  time", duration(result.seconds), f"{duration(training_seconds)} of them training"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:{widths[0]}}  {last:>{widths[1]}}  {rest}".rstrip() for name, last, rest in rows)


def _final(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "val/perplexity" else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
