"""The training loop with a scripted step: when it logs, evaluates, saves and stops."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from lmtrain.config.schema import LinearConfig, PlateauConfig, ScheduleConfig, TrainerConfig
from lmtrain.data.batches import Batch
from lmtrain.training.interrupt import StopRequest
from lmtrain.training.outcomes import ReadOutcome, UnreadOutcomes
from lmtrain.training.step import StepObserver, StepOutcome
from lmtrain.training.trainer import MAX_NONFINITE_IN_A_ROW, Progress, Trainer

TOKENS = 6


class Script:
    """A trainer whose step losses and validation losses are given."""

    def __init__(
        self,
        val_losses: list[float],
        *,
        total_steps: int = 10,
        schedule: ScheduleConfig | None = None,
        progress: Progress | None = None,
        objective: str = "val/loss",
        **settings: Any,
    ) -> None:
        self.records: list[dict[str, float]] = []
        self.saved: list[tuple[int, bool]] = []
        self.steps_made: list[int] = []
        self.on_step: Callable[[int], None] = lambda step: None
        self.bad_steps: set[int] = set()
        self.overflows: set[int] = set()
        self.loss_of: Callable[[int], float] = lambda step: 1.0
        self.states: list[dict[str, Any]] = []
        self.tokens_a_step = TOKENS
        self.without_targets: set[int] = set()
        self.closed = False
        self._val_losses = iter(val_losses)
        config = TrainerConfig(**({"max_steps": total_steps, "eval_every": 2, "log_every": 1} | settings))
        self.trainer = Trainer(
            config=config,
            schedule=schedule or LinearConfig(warmup_steps=0),
            lr=1.0,
            total_steps=total_steps,
            step=self._step,  # type: ignore[arg-type]
            batches=self,
            evaluate=lambda: {"val/loss": next(self._val_losses)},
            capture=lambda state: state,  # type: ignore[arg-type, return-value]
            checkpoints=self,  # type: ignore[arg-type]
            objective=objective,
            record=self.records.append,
            progress=progress or Progress(),
        )

    def __getitem__(self, step: int) -> Batch:
        self.steps_made.append(step)
        tokens = torch.zeros(2, 3, dtype=torch.int64)
        return Batch(tokens, tokens, 0 if step in self.without_targets else self.tokens_a_step)

    def close(self) -> None:
        self.closed = True

    def _step(self, batch: Batch, lr: float, observer: StepObserver | None = None) -> StepOutcome:
        step = self.steps_made[-1]
        self.on_step(step)
        bad = step in self.bad_steps or step in self.overflows
        return StepOutcome(
            torch.tensor(math.nan if bad else self.loss_of(step)),
            torch.tensor(1.0),
            torch.tensor(not bad),
            torch.tensor(step in self.overflows),
        )

    def prepare(self, checkpoint: Any) -> None:
        """Nothing to make ready."""

    def save(self, checkpoint: Any, *, step: int, best_step: int | None) -> None:
        self.states.append(checkpoint)
        self.saved.append((step, step == best_step))

    def wait(self) -> None:
        """Everything is saved at once."""

    def fit(self) -> str:
        with StopRequest() as stop:
            return self.trainer.fit(stop)


def test_a_plain_run_logs_evaluates_and_saves_when_due() -> None:
    script = Script([3.0, 2.0, 2.5, 1.0, 1.5], log_every=5)
    assert script.fit() == "completed"
    assert script.steps_made == list(range(10))
    assert [(r["step"], r["val/loss"]) for r in script.records if "val/loss" in r] == [
        (2, 3.0),
        (4, 2.0),
        (6, 2.5),
        (8, 1.0),
        (10, 1.5),
    ]
    assert [r["step"] for r in script.records if "train/loss" in r] == [5, 10]
    assert script.saved == [(2, True), (4, True), (6, False), (8, True), (10, False)]
    progress = script.trainer.progress
    assert (progress.best_score, progress.best_step, progress.tokens) == (1.0, 8, 10 * TOKENS)


def test_logged_rate_is_that_of_the_step_made() -> None:
    script = Script([1.0], total_steps=4, eval_every=100)
    script.fit()
    assert [r["train/lr"] for r in script.records if "train/lr" in r] == [1.0, 0.75, 0.5, 0.25]


def test_the_logged_loss_is_the_mean_since_the_latest_record() -> None:
    script = Script([1.0], total_steps=7, eval_every=100, log_every=3)
    script.loss_of = lambda step: float(step)
    script.bad_steps = {4}  # a dropped step has no loss to count
    script.fit()
    assert [r["train/loss"] for r in script.records if "train/loss" in r] == [1.0, 4.0, 6.0]


def test_a_step_without_targets_has_no_loss_to_count() -> None:
    script = Script([1.0], total_steps=3, eval_every=100, log_every=3)
    script.loss_of = lambda step: float(step)
    script.without_targets = {1}
    script.fit()
    assert [r["train/loss"] for r in script.records if "train/loss" in r] == [1.0]
    assert script.trainer.progress.tokens == 2 * TOKENS


def test_batches_are_closed_however_the_run_ends() -> None:
    completed, broken = Script([1.0] * 5), Script([1.0] * 5)
    completed.fit()

    def fail(step: int) -> None:
        raise OSError("made up")

    broken.on_step = fail
    with pytest.raises(OSError, match="made up"):
        broken.fit()
    assert completed.closed
    assert broken.closed


def test_the_mean_goes_on_over_a_checkpoint() -> None:
    script = Script([1.0], total_steps=6, eval_every=100, log_every=4, checkpoint_every=2)
    script.loss_of = lambda step: float(step)
    script.fit()
    [first, *_] = script.states
    resumed = Script([1.0], total_steps=6, eval_every=100, log_every=4, progress=Progress(**first))
    resumed.loss_of = lambda step: float(step)
    resumed.fit()
    assert (first["step"], resumed.records[0]["train/loss"]) == (2, (0 + 1 + 2 + 3) / 4)


def test_the_last_step_is_evaluated_whatever_the_interval() -> None:
    script = Script([2.0, 1.0], total_steps=7, eval_every=4)
    script.fit()
    assert [r["step"] for r in script.records if "val/loss" in r] == [4, 7]
    assert script.saved == [(4, True), (7, True)]


def test_checkpoints_between_evaluations() -> None:
    script = Script([2.0], total_steps=6, eval_every=100, checkpoint_every=2)
    script.fit()
    assert script.saved == [(2, False), (4, False), (6, True)]


def test_patience_counts_evaluations_without_a_gain_of_min_delta() -> None:
    script = Script([3.0, 2.0, 1.95, 1.92, 1.0], patience=2, min_delta=0.1)
    assert script.fit() == "early_stopped"
    assert script.trainer.progress.step == 8
    assert script.trainer.progress.best_score == 1.92


def test_small_gains_add_up_against_patience() -> None:
    """Each gain is below min_delta, but two together exceed it: that is progress."""
    script = Script([3.0, 2.94, 2.88, 2.82, 2.76], patience=2, min_delta=0.1)
    assert script.fit() == "completed"


PLATEAU = PlateauConfig(warmup_steps=0, factor=0.5, patience=2)
PLATEAU_LOSSES = [3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 1.0, 1.1]
PLATEAU_RATES = [1.0] * 8 + [0.5] * 4 + [0.25] * 4  # lowered at the evaluations after steps 8 and 12


def test_a_plateau_of_the_objective_lowers_the_rate_from_the_next_step_on() -> None:
    script = Script(PLATEAU_LOSSES, total_steps=16, schedule=PLATEAU)
    assert script.fit() == "completed"
    assert [r["train/lr"] for r in script.records if "train/lr" in r] == PLATEAU_RATES
    assert script.trainer.progress.lr_reductions == 2


@pytest.mark.parametrize("evaluations", [3, 4, 5, 6, 7])
def test_a_plateau_schedule_goes_on_where_it_stopped(evaluations: int) -> None:
    """Wherever it is cut: what it needs is in the progress, which is saved as JSON."""
    first = Script(PLATEAU_LOSSES, total_steps=2 * evaluations, schedule=PLATEAU)
    first.fit()
    saved = Progress(**json.loads(json.dumps(asdict(first.trainer.progress))))
    second = Script(PLATEAU_LOSSES[evaluations:], total_steps=16, schedule=PLATEAU, progress=saved)
    second.fit()
    rates = [r["train/lr"] for script in (first, second) for r in script.records if "train/lr" in r]
    assert rates == PLATEAU_RATES


def test_a_dropped_step_is_counted_and_the_run_goes_on() -> None:
    script = Script([1.0] * 5)
    script.bad_steps = {3, 5}
    assert script.fit() == "completed"
    assert script.trainer.progress.nonfinite_steps == 2


def test_stop_on_nonfinite_ends_at_the_first() -> None:
    script = Script([1.0] * 5, on_nonfinite="stop")
    script.bad_steps = {3}
    assert script.fit() == "diverged"
    assert script.trainer.progress.step == 4


def test_many_dropped_steps_in_a_row_end_the_run() -> None:
    script = Script([1.0] * 50, total_steps=100)
    script.bad_steps = set(range(10, 100))
    assert script.fit() == "diverged"
    assert script.trainer.progress.step == 10 + MAX_NONFINITE_IN_A_ROW
    assert script.trainer.progress.best_score == 1.0


@pytest.fixture
def slow_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outcomes have to be waited for, as on a GPU; fills with how many are read at a time."""
    read, counts = UnreadOutcomes.read, []

    def counted(self: UnreadOutcomes) -> list[ReadOutcome]:
        counts.append(len(self))
        return read(self)

    monkeypatch.setattr(UnreadOutcomes, "reading_waits", True)
    monkeypatch.setattr(UnreadOutcomes, "read", counted)
    return counts


def test_outcomes_are_waited_for_only_where_something_is_logged(
    slow_device: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    script = Script([1.0] * 2, total_steps=20, log_every=5, eval_every=10)
    script.loss_of = lambda step: float(step)
    script.bad_steps = {6, 13}
    assert script.fit() == "completed"
    assert slow_device == [5, 5, 5, 5]
    assert [r["train/loss"] for r in script.records if "train/loss" in r] == [2.0, 7.25, 11.75, 17.0]
    assert script.trainer.progress.nonfinite_steps == 2
    told = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in told] == ["step 7", "step 14"]
    assert told[0].endswith("lmtrain data inspect RUN --step 7")


def test_what_lies_on_the_device_is_in_the_checkpoint(slow_device: list[int]) -> None:
    script = Script([1.0], total_steps=12, log_every=6, eval_every=100, checkpoint_every=4)
    script.bad_steps = {2, 7}
    script.fit()
    assert [(s["nonfinite_steps"], s["loss_sum"], s["loss_steps"]) for s in script.states] == [
        (1, 3.0, 3),
        (2, 1.0, 1),
        (2, 0.0, 0),
    ]
    assert slow_device == [4, 2, 2, 4]


def test_stop_on_nonfinite_waits_for_every_step(slow_device: list[int]) -> None:
    script = Script([1.0] * 5, on_nonfinite="stop", log_every=100)
    script.bad_steps = {3}
    assert script.fit() == "diverged"
    assert script.trainer.progress.step == 4


def test_a_run_that_logs_rarely_ends_soon_after_too_many_dropped_steps(slow_device: list[int]) -> None:
    script = Script([1.0] * 50, total_steps=1000, log_every=1000, eval_every=1000)
    script.bad_steps = set(range(10, 1000))
    assert script.fit() == "diverged"
    assert script.trainer.progress.step <= 10 + 2 * MAX_NONFINITE_IN_A_ROW


def test_overflows_of_the_loss_scale_do_not_count() -> None:
    script = Script([1.0] * 50, total_steps=60)
    script.overflows = set(range(5, 5 + 2 * MAX_NONFINITE_IN_A_ROW))
    assert script.fit() == "completed"
    assert script.trainer.progress.nonfinite_steps == 0


def test_a_validation_loss_that_is_not_finite_is_never_best() -> None:
    script = Script([math.nan, 2.0, math.inf, 1.5, math.nan])
    script.fit()
    assert script.trainer.progress.best_score == 1.5
    assert script.trainer.progress.last_score == 1.5
    assert [best for _, best in script.saved] == [False, True, False, True, False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(number: signal.Signals) -> None:
    script = Script([1.0] * 5, eval_every=100)
    script.on_step = lambda step: signal.raise_signal(number) if step == 4 else None
    assert script.fit() == "interrupted"
    assert script.trainer.progress.step == 5
    assert script.saved == [(5, False)]
    assert script.records[-1]["step"] == 5


def test_a_second_interrupt_stops_at_once() -> None:
    script = Script([1.0] * 5)
    before = signal.getsignal(signal.SIGINT)  # a shell that starts the tests in the background has it ignored

    def twice(step: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    script.on_step = twice
    with pytest.raises(KeyboardInterrupt):
        script.fit()
    assert script.trainer.progress.step == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_training_loss_as_objective_is_that_of_the_evaluated_step() -> None:
    script = Script([9.0] * 5, eval_every=2, log_every=5, objective="train/loss")
    script.loss_of = lambda step: 10.0 - step
    assert script.fit() == "completed"
    assert script.trainer.progress.best_score == 1.5  # the mean of the last two steps
    assert script.trainer.progress.best_step == 10


def test_a_run_that_ends_on_a_loss_that_is_not_finite_has_diverged() -> None:
    assert Script([1.0, math.nan], total_steps=4).fit() == "diverged"


def test_out_of_memory_is_a_status() -> None:
    script = Script([1.0] * 5)

    def fail(step: int) -> None:
        if step == 3:
            raise torch.OutOfMemoryError("made up")

    script.on_step = fail
    assert script.fit() == "out_of_memory"


def test_a_resumed_trainer_makes_only_the_steps_left() -> None:
    script = Script([1.0, 0.5], total_steps=10)
    script.trainer.progress = Progress(step=7, tokens=7 * TOKENS, best_score=0.7, best_step=6, score_to_beat=0.7)
    script.fit()
    assert script.steps_made == [7, 8, 9]
    assert script.trainer.progress.best_score == 0.5
    assert script.trainer.progress.tokens == 10 * TOKENS


# ------------------------------------------------------------------------------------------- runs of a study


def test_evaluations_by_tokens_are_told_at_the_same_counts_for_every_batch_size() -> None:
    told: dict[int, list[int]] = {}
    for tokens_a_step in (3, 5):
        script = Script([1.0] * 6, total_steps=60 // tokens_a_step, eval_every=None, eval_every_tokens=10)
        script.tokens_a_step = tokens_a_step
        told[tokens_a_step] = []
        script.trainer.judge = lambda tokens, score, seen=told[tokens_a_step]: bool(seen.append(tokens))
        assert script.fit() == "completed"
    assert told[3] == told[5] == [10, 20, 30, 40, 50, 60]


def test_a_verdict_ends_the_run_but_not_before_the_warmup() -> None:
    script = Script([5.0, 4.0, 3.0, 2.0], total_steps=20)
    script.trainer.judge, script.trainer.warmup_steps = (lambda tokens, score: True), 5
    assert script.fit() == "pruned"
    assert script.trainer.progress.step == 6
    resumed = Script([9.0], total_steps=20, progress=script.trainer.progress)
    resumed.trainer.judge = lambda tokens, score: score == 3.0
    assert resumed.fit() == "pruned", "a verdict that was lost is asked for again"
    assert resumed.trainer.progress.step == 6


def test_the_last_evaluation_is_told_but_ends_nothing() -> None:
    script = Script([5.0], total_steps=2)
    told = []
    script.trainer.judge = lambda tokens, score: bool(told.append((tokens, score))) or True
    assert script.fit() == "completed"
    assert told == [(2 * TOKENS, 5.0)]


def test_a_loss_spike_is_told_once_however_long_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    script = Script([1.0], total_steps=60, eval_every=100)
    script.loss_of = lambda step: 5.0 if 40 <= step < 50 else 1.0 + 0.01 * (step % 3)
    script.fit()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "step 41: loss spike: 5, where the median of the latest 32 records is 1.01"


def test_a_spike_is_told_of_after_a_resume_as_without_one(caplog: pytest.LogCaptureFixture) -> None:
    """What it is compared with is in the progress, which is saved as JSON."""
    first = Script([1.0], total_steps=40, eval_every=100)
    first.fit()
    saved = Progress(**json.loads(json.dumps(asdict(first.trainer.progress))))
    second = Script([1.0], total_steps=50, eval_every=100, progress=saved)
    second.loss_of = lambda step: 5.0
    second.fit()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 41"]


class Watcher:
    """Diagnostics that only note which steps they were asked about."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def report(self, step: int) -> dict[str, float]:
        self.steps.append(step)
        return {"diagnostics/seen": 1.0}


def test_diagnostics_look_at_the_first_the_last_and_every_nth_step_not_at_dropped_ones() -> None:
    script = Script([1.0] * 2, total_steps=11, eval_every=100, diagnostics_every=4, log_every=10)
    script.bad_steps = {7}
    watcher = script.trainer.diagnostics = Watcher()  # type: ignore[assignment]
    script.fit()
    assert watcher.steps == [1, 4, 11]
    assert [r["step"] for r in script.records if "diagnostics/seen" in r] == [1, 4, 11]
    assert [r["step"] for r in script.records if "train/loss" in r] == [10, 11]


def test_a_request_inside_another_takes_over_what_came_before() -> None:
    with StopRequest() as outer:
        signal.raise_signal(signal.SIGTERM)
        assert outer.signal == signal.SIGTERM
        with StopRequest() as inner:
            assert inner.signal == signal.SIGTERM
    with StopRequest() as fresh:
        assert fresh.signal is None
