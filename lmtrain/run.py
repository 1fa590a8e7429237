"""The composition root: from one `ExperimentConfig` to a finished run folder.

Builds every part, hands each its own slice of the settings, and sees to it that the folder tells what happened
whatever happens. The parts do not know each other; this file knows them all.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from lmtrain.config.saved import resume_differences, to_yaml, with_choices_of
from lmtrain.config.schema import ExperimentConfig
from lmtrain.console import ProgressLine, announce, show_end
from lmtrain.data.prepared import PreparedData
from lmtrain.distributed.team import require_team
from lmtrain.errors import Interrupted, RunError, RunFolderError
from lmtrain.inference import TrainedModel
from lmtrain.inference.sample import sample
from lmtrain.inference.serving import save_mlflow_model
from lmtrain.origin import Origin
from lmtrain.redaction import redact
from lmtrain.run_description import describe_run
from lmtrain.run_dir import RunDir
from lmtrain.session import Session
from lmtrain.shared_run import RunOrder, build, joint_judge
from lmtrain.store.opening import require_no_entry
from lmtrain.tracking.environment import describe_environment, git_state
from lmtrain.tracking.metrics_file import MetricsFile, read_metrics, truncate_after
from lmtrain.tracking.plots import plot_run
from lmtrain.tracking.system_metrics import SystemMetrics
from lmtrain.tracking.tracker import Tracker, build_tracker
from lmtrain.training.checkpoint import CheckpointFolder
from lmtrain.training.interrupt import StopRequest
from lmtrain.training.trainer import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended; `result.json` holds this and what it was made with."""

    status: str  # completed, early_stopped, pruned, diverged, out_of_memory, interrupted, failed
    objective: float | None  # lowest value reached, or the last finite one of a run that diverged early
    objectives: dict[str, float | None]  # that, and what else config.objective names
    last_score: float | None  # last finite value of the first objective
    best_step: int | None
    step: int
    tokens: int
    metrics: dict[str, float]  # the last value of each
    seconds: float  # of this attempt, from its first line to its last


def ended_for_good(folder: RunDir) -> RunResult | None:
    """How the run in a folder ended; None if there is none, or one that was interrupted or failed and may go on."""
    content = folder.read_result()
    if content is None or content["status"] in ("interrupted", "failed"):
        return None
    return RunResult(**{field.name: content[field.name] for field in fields(RunResult)})


class StudyJudge(Protocol):
    """What a run of a study tells the study, and asks it (`trainer.Judge`)."""

    def __call__(self, tokens: int, score: float) -> bool: ...

    def read(self, texts: Mapping[str, str]) -> None:
        """Told the fingerprints of what will be trained on. Raises TextChangedError if trials would not compare."""


def run_experiment(
    config: ExperimentConfig, run_dir: Path, origin: Origin | None = None, judge: StudyJudge | None = None
) -> RunResult:
    """Train as `config` says in the folder `run_dir`, continuing what is there if `config.resume` says so.

    A run with a `judge` belongs to a study, which has a display of its own: it draws no progress bar, no pictures and
    no sample.

    Raises UsageError before anything is written if the request cannot be met, Interrupted after a checkpoint when
    a signal asked to stop, RunError when the disk is full. Any other error is noted in the folder and raised again.
    """
    started = time.time()
    team = require_team(config.parallel.strategy)
    folder = require_no_entry(RunDir(run_dir))
    try:
        folder.lock()
        if config.resume is not None and folder.is_run():
            config = with_choices_of(folder.config.read_text(encoding="utf-8"), config)
        resuming = _wants_to_resume(folder, config)
        # What a run began with need no longer be there: its checkpoint has other weights.
        tracker = build_tracker(config.tracking, save_mlflow_model)
        order = RunOrder(
            config=replace(config, init_from=None if resuming else config.init_from),
            folder=folder.path.absolute(),
            resuming=resuming,
            ended=_has_ended(folder),
            judged=judge is not None,
        )
        session, data = build(team.begin(order).config, team, None if judge is None else judge.read)
        config = replace(session.config, init_from=session.config.init_from or config.init_from)
        attempt = _Attempt(config, folder, origin or Origin(), session, data, tracker, started, judge)
        return attempt.execute(order)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        remedy = f"make room, then go on with resume={folder}" if folder.is_run() else "make room"
        raise RunError(f"the disk is full, cannot write {error.filename or folder}; {remedy}") from error
    finally:
        folder.unlock()
        folder.discard_if_unused()


def _wants_to_resume(folder: RunDir, config: ExperimentConfig) -> bool:
    if config.resume is None:
        if folder.is_run():
            raise RunFolderError(
                f"{folder} already holds a run; continue it with resume={folder} or choose another folder"
            )
        return False
    checkpoints = CheckpointFolder(folder.checkpoints)
    checkpoints.require_not_removed()
    there = checkpoints.has_any()
    if not there and folder.is_run():
        log.warning("%s has no checkpoint yet: starting it again from step 0", folder)
    if there and not config.force:
        _refuse_differences(folder, resume_differences(folder.config.read_text(encoding="utf-8"), config))
    return there


def _has_ended(folder: RunDir) -> bool:
    result = folder.read_result()
    return result is not None and result["status"] != "failed"


def _refuse_differences(folder: RunDir, differences: list[str]) -> None:
    if differences:
        raise RunFolderError(
            f"{folder} cannot be continued otherwise than it was begun: {'; '.join(differences)}\n"
            "change only its budget or what it logs, or add force=true to go on all the same"
        )


class _Attempt:
    """One attempt at a run: the first, or a later one that continues it."""

    def __init__(
        self,
        config: ExperimentConfig,
        folder: RunDir,
        origin: Origin,
        session: Session,
        data: PreparedData,
        tracker: Tracker,
        started: float,
        judge: StudyJudge | None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.origin = origin
        self.session = session
        self.data = data
        self.tracker = tracker
        self.started = started
        self.judge = judge
        self.number = 0
        self.progress = Progress()
        self.latest: dict[str, float] = {}
        self.training_seconds = 0.0

    def execute(self, order: RunOrder) -> RunResult:
        """Train to an end, whichever it is, and note it in the folder."""
        with self.session.team.agreeing():
            if order.resuming:
                self.progress = self.session.restore(self.folder.checkpoints)
                if order.leaves_nothing(self.session, self.progress):
                    return self._nothing_left()
            self._claim(order.resuming)
        with _file_log(self.folder.log):
            info = describe_run(
                self.session, self.data, self.folder, self.origin, started=self.started, attempt=self.number
            )
            info.write()
            self.tracker.start(info)
            announce(self.session, self.data, self.folder)
            status, error, stop = "failed", None, StopRequest(self._deadline())
            try:
                with stop:  # before there are metrics: whoever sees some may ask the run to stop
                    status = self._train(stop)
            except BaseException as problem:
                error = problem
                log.debug("the run failed", exc_info=True)
                raise
            finally:
                result = self._finish(status, error)
        if stop.signal is not None and status == "interrupted":
            raise Interrupted(
                f"stopped by {stop.signal.name} at step {result.step}; go on with resume={self.folder}",
                stop.signal,
            )
        return result

    def _nothing_left(self) -> RunResult:
        log.info(
            "%s is complete at step %d; to go on, give it more: resume=%s trainer.max_steps=N",
            self.folder,
            self.progress.step,
            self.folder,
        )
        return self._result("completed")

    def _claim(self, resuming: bool) -> None:
        """From here on the folder is this run's."""
        self.folder.reserve_result()
        if resuming:
            earlier = read_metrics(self.folder.metrics)
            self.number = 1 + max((int(record["attempt"]) for record in earlier), default=0)
            for record in earlier:
                self.latest |= record if record["step"] <= self.progress.step else {}
            truncate_after(self.folder.metrics, self.progress.step)
            truncate_after(self.folder.histograms, self.progress.step)
        else:
            self.folder.metrics.unlink(missing_ok=True)
            self.folder.histograms.unlink(missing_ok=True)
        git = git_state(Path.cwd())
        diff = {self.folder.git_diff.name: git.diff} if git is not None and git.dirty else {}
        self.folder.write_texts({self.folder.config.name: to_yaml(self.config), **self.origin.files, **diff})
        self.folder.result.unlink(missing_ok=True)
        self.data.tokenizer.save(self.folder.tokenizer)

    def _train(self, stop: StopRequest) -> str:
        label = self.folder.path.name if self.origin.sweep_dir is not None else ""
        metrics, system = MetricsFile(self.folder.metrics), SystemMetrics(self.config.tracking.system_metrics_every)
        line = ProgressLine(
            label, total_steps=self.session.total_steps, first_step=self.progress.step, bar=self.judge is None
        )

        def record(measured: dict[str, float]) -> None:
            sampled = system.newest() if "train/loss" in measured else {}
            complete = measured | sampled | {"time": time.time(), "attempt": self.number}
            metrics.append(complete)
            self.tracker.log(complete)
            line.show(complete)
            self.latest |= measured

        team = self.session.team
        trainer = self.session.trainer(self.folder, record, self.progress, joint_judge(team, self.judge))
        with contextlib.closing(metrics), system, line:
            try:
                with team.together(f"go on with resume={self.folder}"):
                    return trainer.fit(stop)
            finally:
                self.progress = trainer.progress
                self.training_seconds = trainer.stopwatch.seconds

    def _finish(self, status: str, error: BaseException | None) -> RunResult:
        result = self._result(status)
        details: dict[str, Any] = {
            "objective_name": self.config.objectives[0],
            "training_seconds": self.training_seconds,
            "attempt": self.number,
            "nonfinite_steps": self.progress.nonfinite_steps,
            "processes": self.session.team.size,
            "micro_batch_size": self.session.step.micro_batch_size,
            "parameters": self.session.num_parameters,
            "overrides": [redact(word) for word in self.origin.overrides],
            "data_fingerprint": self.data.fingerprint,
            "tokenizer_fingerprint": self.data.tokenizer.fingerprint,
            "texts": self.data.texts,
            "ended": time.time(),
            "error": f"{type(error).__name__}: {error}" if error is not None else None,
            "environment": describe_environment(),
        }
        self.folder.write_result(asdict(result) | details)
        try:
            if self.judge is None:
                self._write_pictures_and_sample(result)
        except OSError as problem:  # a full disk; it must not hide how the run ended
            log.warning("cannot write pictures or sample: %s", problem)
        finally:  # whatever happens to those, mirrors hear how the run ended
            self.tracker.finish()
        return result

    def _write_pictures_and_sample(self, result: RunResult) -> None:
        if self.folder.metrics.exists():
            plot_run(read_metrics(self.folder.metrics), self.folder.plots, self.folder.histograms)
        if result.status in ("completed", "early_stopped"):
            if self.config.trainer.sample_tokens and self.config.parallel.strategy != "fsdp":  # the model is in parts
                self.folder.write_texts({self.folder.sample.name: self._sample()})
            else:
                self.folder.sample.unlink(missing_ok=True)  # that of an earlier attempt
            show_end(self.folder, result, self.config.objectives[0], self.training_seconds)

    def _deadline(self) -> float | None:
        limit = self.config.trainer.time_limit
        return None if limit is None else self.started + limit

    def _result(self, status: str) -> RunResult:
        progress = self.progress
        seconds = time.time() - self.started
        best = progress.best_score if progress.best_score is not None else progress.last_score
        counts = {"run/parameters": float(self.session.num_parameters), "run/seconds": seconds}
        others = {name: (self.latest | counts).get(name) for name in self.config.objectives[1:]}
        return RunResult(
            status=status,
            objective=best,
            objectives={self.config.objectives[0]: best, **others},
            last_score=progress.last_score,
            best_step=progress.best_step,
            step=progress.step,
            tokens=progress.tokens,
            metrics={name: value for name, value in self.latest.items() if "/" in name},
            seconds=seconds,
        )

    def _sample(self) -> str:
        trained = TrainedModel(
            config=self.config, model=self.session.model, tokenizer=self.data.tokenizer, step=self.progress.step
        )
        return sample(trained, self.data.documents("val")[0], max_new_tokens=self.config.trainer.sample_tokens)


@contextlib.contextmanager
def _file_log(path: Path) -> Iterator[None]:
    """Copy every message of this process into a file while entered."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is told once, not at each line
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
