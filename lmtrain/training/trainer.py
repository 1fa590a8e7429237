"""The training loop: when to step, log, evaluate, save and stop.

Knows neither Hydra nor where records go: each is handed to `record`.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from lmtrain.config.schema import ScheduleConfig, TrainerConfig
from lmtrain.data.batches import Batch
from lmtrain.training.checkpoint import Checkpoint
from lmtrain.training.checkpoint_writer import Checkpoints
from lmtrain.training.diagnostics import SPIKE_WINDOW, Diagnostics, is_spike
from lmtrain.training.interrupt import StopRequest
from lmtrain.training.outcomes import UnreadOutcomes
from lmtrain.training.profiling import StepProfiler
from lmtrain.training.schedules import lr_at, reduction_due
from lmtrain.training.step import StepOutcome, TrainingStep

log = logging.getLogger(__name__)

MAX_NONFINITE_IN_A_ROW = 25
"""So many dropped steps one after the other mean that the run will not recover."""


Judge = Callable[[int, float], bool]
"""Is told tokens and objective at every evaluation; True asks to end the run: others of its study do better."""


class Batches(Protocol):
    """Training batches, addressed by step."""

    def __getitem__(self, step: int) -> Batch: ...

    def close(self) -> None:
        """No more are asked for."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0  # optimizer steps made
    tokens: int = 0  # targets trained on
    best_score: float | None = None  # lowest objective so far
    best_step: int | None = None
    score_to_beat: float | None = None  # what patience compares with, by min_delta
    last_score: float | None = None  # objective of the latest evaluation that was finite
    evaluated_step: int | None = None  # of the latest evaluation
    evaluations_without_gain: int = 0
    lr_reductions: int = 0  # made by the plateau schedule
    nonfinite_steps: int = 0  # dropped in all
    nonfinite_in_a_row: int = 0
    loss_sum: float = 0.0  # of the steps since the latest record
    loss_steps: int = 0
    recent_losses: Sequence[float] = ()  # of the latest records, for the notice of a spike


class Stopwatch:
    """Seconds spent training, pauses not counted."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        self._before = self.seconds
        try:
            yield
        finally:
            self._started = time.perf_counter()


class Trainer:
    """Runs the loop from `progress` to `total_steps`, or to an earlier end."""

    def __init__(
        self,
        *,
        config: TrainerConfig,
        schedule: ScheduleConfig,
        lr: float,
        total_steps: int,
        step: TrainingStep,
        batches: Batches,
        evaluate: Callable[[], dict[str, float]],
        capture: Callable[[dict[str, Any]], Checkpoint],
        checkpoints: Checkpoints,
        objective: str,
        record: Callable[[dict[str, float]], None],
        progress: Progress,
        prepare: Callable[[], None] = lambda: None,
        run_name: str = "RUN",
        judge: Judge | None = None,
        warmup_steps: int = 0,
        diagnostics: Diagnostics | None = None,
        utilisation: Callable[[float], dict[str, float]] = lambda tokens_per_second: {},
        profiler: StepProfiler | None = None,
        agree: Callable[[int], int] = int,
    ) -> None:
        """`prepare` is called before the first step, and may find that not one sequence fits into memory.

        `agree` gives the largest of the numbers that the processes of the run give it.
        `judge` is heard from the end of the first `warmup_steps` on: before it, runs cannot be compared."""
        self.config = config
        self.schedule = schedule
        self.lr = lr
        self.total_steps = total_steps
        self.step = step
        self.batches = batches
        self.evaluate = evaluate
        self.capture = capture
        self.checkpoints = checkpoints
        self.objective = objective
        self.record = record
        self.progress = progress
        self.prepare = prepare
        self.run_name = run_name  # the run folder, for messages
        self.judge = judge
        self.warmup_steps = warmup_steps
        self.diagnostics = diagnostics
        self.utilisation = utilisation
        self.profiler = profiler
        self.agree = agree
        self.stopwatch = Stopwatch()
        self._latest: dict[str, float] = {}
        self._logged = (0.0, progress.tokens)  # seconds and tokens at the latest record
        self._outcomes = UnreadOutcomes()

    def fit(self, stop: StopRequest) -> str:
        """Train; returns the status: completed, early_stopped, pruned, diverged, out_of_memory or interrupted.

        Raises RunError if a checkpoint cannot be written. When this returns, all are.
        """
        try:
            self.prepare()
            with self.profiler or nullcontext():
                return self._loop(stop)
        except torch.OutOfMemoryError as error:
            log.error(
                "out of memory with one sequence at a time (%s)\n"
                "trainer.activation_checkpointing=full, a shorter data.seq_len or a smaller model needs less",
                error,
            )
            return "out_of_memory"
        finally:
            self.batches.close()
            self.checkpoints.wait()

    def _loop(self, stop: StopRequest) -> str:
        self.stopwatch = Stopwatch()
        if self._not_worth_it():  # killed after the evaluation of the checkpoint, before the verdict took effect
            return "pruned"
        if self._out_of_patience():  # killed after the checkpoint, before it took effect
            return "early_stopped"
        first = self.progress.step
        while self.progress.step < self.total_steps:
            tokens_before = self.progress.tokens
            outcome = self._advance()
            if self.profiler is not None:
                with self.stopwatch.paused():
                    self.profiler.step()
            done = self.progress.step
            if done == first + 1:  # from now on the optimizers have the state that checkpoints will hold
                self.checkpoints.prepare(self.capture({}))
            interrupted = stop.settle(self.agree) and done < self.total_steps
            evaluating = done == self.total_steps or self._evaluation_due(tokens_before)
            # A training loss that is the objective must be that of the step evaluated.
            wanted = evaluating and self.objective.startswith("train/")
            logging_due = wanted or done == self.total_steps or done % self.config.log_every == 0
            every = self.config.checkpoint_every
            saving = interrupted or done == self.total_steps or (evaluating if every is None else done % every == 0)
            if (logging_due or evaluating or saving or self._reading_due()) and self._diverged():
                return "diverged"
            if logging_due:
                self._log_step(outcome)
            improved = evaluating and self._evaluate()
            if improved or saving:
                self._save()
            if evaluating and self._not_worth_it() and done < self.total_steps:
                return "pruned"
            if self._out_of_patience():
                return "early_stopped"
            if interrupted:
                return "interrupted"
        return "completed" if math.isfinite(self._latest.get(self.objective, 0.0)) else "diverged"

    def _evaluation_due(self, tokens_before: int) -> bool:
        if self.config.eval_every is not None:
            return self.progress.step % self.config.eval_every == 0
        return self._rung(self.progress.tokens) > self._rung(tokens_before)

    def _rung(self, tokens: int) -> int:
        """Tokens of the latest evaluation due, as every batch size has it."""
        every = self.config.eval_every_tokens
        return tokens if every is None else tokens // every * every

    def _not_worth_it(self) -> bool:
        """Tell the judge of the latest evaluation, if that was just now; returns its verdict."""
        progress = self.progress
        if self.judge is None or progress.last_score is None or progress.evaluated_step != progress.step:
            return False
        asked_to_end = self.judge(self._rung(progress.tokens), progress.last_score)
        return asked_to_end and progress.step > self.warmup_steps

    def _advance(self) -> StepOutcome:
        step = self.progress.step
        batch = self.batches[step]
        observer = self.diagnostics if self._diagnosing(step + 1) else None
        outcome = self.step(batch, self._lr(step), observer)
        self._outcomes.add(step + 1, batch.num_targets > 0, outcome)
        self.progress = replace(self.progress, step=step + 1, tokens=self.progress.tokens + batch.num_targets)
        if observer is not None and outcome.applied:
            self._record(observer.report(step + 1))
        return outcome

    def _diagnosing(self, done: int) -> bool:
        """Whether to look inside the step after which `done` are made."""
        return done in (1, self.total_steps) or done % self.config.diagnostics_every == 0

    def _reading_due(self) -> bool:
        """Whether to read outcomes also where nothing is logged, evaluated or saved.

        Where that waits for the device: only if a failed step is to end the run at once, or as many have been made as
        may fail in a row.
        """
        urgent = self.config.on_nonfinite == "stop" or len(self._outcomes) >= MAX_NONFINITE_IN_A_ROW
        return urgent or not self._outcomes.reading_waits

    def _diverged(self) -> bool:
        """Count what the latest steps came to, tell of dropped ones, and whether these end the run."""
        allowed = 1 if self.config.on_nonfinite == "stop" else MAX_NONFINITE_IN_A_ROW
        diverged = False
        for outcome in self._outcomes.read():
            before, dropped = self.progress, not (outcome.applied or outcome.overflow)
            counted = outcome.applied and outcome.has_targets
            self.progress = replace(
                before,
                nonfinite_steps=before.nonfinite_steps + dropped,
                nonfinite_in_a_row=before.nonfinite_in_a_row + 1 if dropped else 0,
                loss_sum=before.loss_sum + (outcome.loss if counted else 0.0),
                loss_steps=before.loss_steps + counted,
            )
            if dropped:
                outcome.tell_dropped(self.run_name)
            diverged = diverged or self.progress.nonfinite_in_a_row >= allowed
        return diverged

    def _log_step(self, outcome: StepOutcome) -> None:
        """Record the mean loss of the steps since the latest record, and how the step at hand went."""
        steps = self.progress.loss_steps
        loss = self.progress.loss_sum / steps if steps else math.nan
        self.progress = replace(self.progress, loss_sum=0.0, loss_steps=0)
        seconds, tokens = self.stopwatch.seconds, self.progress.tokens
        before_seconds, before_tokens = self._logged
        self._logged = (seconds, tokens)
        speed = (tokens - before_tokens) / max(seconds - before_seconds, 1e-9)
        self._record(
            {
                "train/loss": loss,
                "train/lr": self._lr(self.progress.step - 1),
                "train/grad_norm": outcome.grad_norm.item(),
                "train/tokens_per_second": speed,
                **self.utilisation(speed),
            }
        )
        self._tell_of_a_spike(loss)

    def _tell_of_a_spike(self, loss: float) -> None:
        """Warn once when the loss of a record is far above those before, however long it stays there."""
        recent = tuple(self.progress.recent_losses)
        if is_spike(loss, recent) and not is_spike(recent[-1], recent[:-1]):
            log.warning(
                "step %d: loss spike: %.4g, where the median of the latest %d records is %.4g",
                self.progress.step,
                loss,
                len(recent),
                statistics.median(recent),
            )
        if math.isfinite(loss):
            self.progress = replace(self.progress, recent_losses=(*recent, loss)[-SPIKE_WINDOW:])

    def _evaluate(self) -> bool:
        """Evaluate and record; returns whether the objective is the best so far."""
        with self.stopwatch.paused():
            self._record(self.evaluate())
        score = self._latest[self.objective]
        before = self.progress
        finite = math.isfinite(score)
        improved = finite and (before.best_score is None or score < before.best_score)
        gained = finite and (before.score_to_beat is None or score < before.score_to_beat - self.config.min_delta)
        without_gain = 0 if gained else before.evaluations_without_gain + 1
        reduced = reduction_due(self.schedule, without_gain)
        self.progress = replace(
            before,
            last_score=score if finite else before.last_score,
            evaluated_step=before.step,
            best_score=score if improved else before.best_score,
            best_step=before.step if improved else before.best_step,
            score_to_beat=score if gained else before.score_to_beat,
            evaluations_without_gain=without_gain,
            lr_reductions=before.lr_reductions + reduced,
        )
        if reduced:
            log.info("no gain in %d evaluations: the learning rate is now %.3g", without_gain, self._lr(before.step))
        return improved

    def _lr(self, step: int) -> float:
        reductions = self.progress.lr_reductions
        return lr_at(self.schedule, step, lr=self.lr, total_steps=self.total_steps, reductions=reductions)

    def _save(self) -> None:
        with self.stopwatch.paused():
            self.checkpoints.save(
                self.capture(asdict(self.progress)), step=self.progress.step, best_step=self.progress.best_step
            )

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _record(self, metrics: dict[str, float]) -> None:
        self._latest |= metrics
        self.record({"step": self.progress.step, "tokens": self.progress.tokens, **metrics})
