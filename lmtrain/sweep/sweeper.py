"""What Hydra calls of a multirun: the study sweeper, its workers, and the summary of other sweeps.

Owns the way between Hydra and a study: trials as jobs, launching workers. What a study is and how a worker goes on
is in `study` and `worker`, which know no Hydra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lmtrain.config import compose
from lmtrain.config.explain import PastHydra
from lmtrain.config.launch import count_workers, runs_here, settle_workers
from lmtrain.config.points import (
    TrialConfigs,
    first_settings,
    grid_of,
    require_options,
    runs_of_grid,
    search_function,
)
from lmtrain.config.schema import ExperimentConfig, TrackingConfig
from lmtrain.config.search_space import defaults_within, parse_space
from lmtrain.config.study_sweeper import build_pruner, build_sampler, directions_of, is_grid
from lmtrain.errors import Interrupted
from lmtrain.places import Places, share_this_machine
from lmtrain.run_dir import RunDir

if TYPE_CHECKING:
    from optuna import Trial

    from lmtrain.run import RunResult, StudyJudge
    from lmtrain.sweep.study import FailurePolicy, StudyPlan
    from lmtrain.sweep.worker import Train

log = logging.getLogger(__name__)

WORKER_FOLDER = ".workers"
"""Inside a sweep folder: what Hydra makes for the jobs that are workers."""


@dataclass(frozen=True)
class HydraTrain:
    """Trains a trial as a job of Hydra, with its share of this machine."""

    configs: TrialConfigs
    places: Places | None  # processes that share this machine; None: each trial has it to itself

    def folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.configs.folder(number)

    def again(
        self, number: int, params: Mapping[str, Any], judge: StudyJudge, *, seed: int, subfolder: str
    ) -> RunResult:
        """Make the run of a trial with another seed, in this folder of the sweep. Raises what the run raises."""
        space = self.configs.space.changed({"seed": seed, "hydra.sweep.subdir": subfolder})
        again = dataclasses.replace(self, configs=dataclasses.replace(self.configs, space=space))
        return again(number, params, judge)

    def __call__(self, number: int, params: Mapping[str, Any], judge: StudyJudge) -> RunResult:
        """Make the run, or go on with it. Raises what the run raises."""
        config = self.configs(number, params)
        # What Hydra's own `run_job` would do, which copies the config a dozen times: a tenth of a second.
        hydra = HydraConfig.instance()
        of_the_worker = hydra.cfg
        hydra.set_config(config)
        folder = Path(str(config.hydra.sweep.dir)).absolute() / str(config.hydra.sweep.subdir)
        with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
            config.hydra.runtime.output_dir = str(folder)
        hydra.set_config(config)
        with open_dict(config):
            del config["hydra"]
        try:
            return self._run(config, judge, number)
        finally:
            hydra.cfg = of_the_worker

    def _run(self, config: DictConfig, judge: StudyJudge, number: int) -> RunResult:
        from lmtrain.run import run_experiment
        from lmtrain.sweep.retention import keep_best_checkpoints

        job = compose.current_job()
        try:
            settings = compose.parse_config(config)
            origin = dataclasses.replace(compose.origin_of(config, job), tags={"trial": str(number)})
            seated = self._seated(settings, begun=RunDir(job.run_dir).is_run())
            result = run_experiment(seated, job.run_dir, origin, judge)
            if settings.sweep.keep_checkpoints is not None:
                keep_best_checkpoints(job.run_dir.parent, settings.sweep.keep_checkpoints)
            return result
        finally:
            RunDir(job.run_dir).discard_if_unused()

    def _seated(self, settings: ExperimentConfig, *, begun: bool) -> ExperimentConfig:
        """A trial goes on where it was, with the threads it was begun with; a new one takes its share of the cores."""
        settings = dataclasses.replace(settings, resume="auto")
        return settings if self.places is None or begun else self.places.seat(settings)


@dataclass(frozen=True)
class WorkerTask:
    """What the launcher runs in each of its jobs: one worker, until no trial is left."""

    plan: StudyPlan
    train: Train
    fixed: tuple[str, ...]  # overrides that all trials share
    failures: FailurePolicy
    places: Places | None  # processes that share this machine; None: the launcher says what each may use
    coordinator: int | None  # the process that started the worker as its child; None: it is no child

    def __call__(self, config: DictConfig) -> int:
        """Returns the number of the signal that stopped the worker, or 0."""
        from lmtrain.sweep.study import SharedStudy
        from lmtrain.sweep.worker import work
        from lmtrain.training.interrupt import leave_to_batch_system

        worker = int(HydraConfig.get().job.num)
        _show_only_the_study(Path(HydraConfig.get().runtime.output_dir))
        if self.places is not None:
            self.places.take()
        try:
            work(SharedStudy(self.plan), self.train, worker=worker, failures=self.failures, is_orphan=self._is_orphan)
        except Interrupted as error:
            if self._is_orphan():  # a pool's process would wait minutes for another task
                os._exit(error.exit_status)
            leave_to_batch_system(error.signal_number)
            return error.signal_number
        return 0

    def _is_orphan(self) -> bool:
        return self.coordinator not in (None, os.getpid(), os.getppid())


def _show_only_the_study(folder: Path) -> None:
    """Let the console hear of the study and of warnings; what a run says is in its folder.

    A line from a process of its own would tear the live table on the terminal: those go to a file in `folder`.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            if multiprocessing.parent_process() is not None and handler.stream.isatty():
                root.removeHandler(handler)
                root.addHandler(handler := logging.FileHandler(folder / "worker.log", encoding="utf-8", delay=True))
            handler.addFilter(
                lambda record: record.levelno >= logging.WARNING or record.name.startswith("lmtrain.sweep")
            )


class StudySweeper(Sweeper):
    """`hydra/sweeper=study`: a study of equal workers, each asking for its next trial when it is free."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self._config = config
        self._context = hydra_context

    def sweep(self, arguments: list[str]) -> None:
        """Run the study to its end. Raises LmtrainError for a wrong request, a failed study or an interruption."""
        from lmtrain.sweep.confirm import confirm_best
        from lmtrain.sweep.confirmation import show_confirmation
        from lmtrain.sweep.coordinator import open_study, run_workers
        from lmtrain.sweep.core_division import divide_cores
        from lmtrain.sweep.report import reported
        from lmtrain.sweep.setup import define_study, require_data, warn_of_doubts
        from lmtrain.sweep.sizing import require_room_in_study
        from lmtrain.sweep.study import FailurePolicy
        from lmtrain.sweep.warm_start import trials_to_learn_from

        trials, base, plan = self.request(arguments)
        workers = count_workers(self._config, self.settings["n_jobs"], base)
        number = min(workers.number, plan.num_trials)
        how = {
            name: cast("dict[str, Any]", OmegaConf.to_container(self.settings[name])) for name in ("sampler", "pruner")
        }
        warn_of_doubts(plan, base, workers=number, **how)
        if base.sweep.dry_run:
            from lmtrain.sweep.dry_run import show_study

            if workers.undecided:
                number = divide_cores(base, number, probe=False)
            return show_study(plan, trials.settings_of, base, workers=number, local=runs_here(self._config), **how)
        if runs_here(self._config):
            require_room_in_study(trials.corners)
            prepared = require_data(plan.space, base)
            if workers.undecided and prepared:
                number = divide_cores(base, number)
        definition = define_study(plan, base, custom=self.settings["custom_search_space"], **how)
        earlier = trials_to_learn_from(base.sweep.start_from, plan, definition)
        study = open_study(plan, definition, force=base.force)
        study.add_missing(earlier)
        if earlier and not study.imported:
            log.warning("sweep.start_from is without effect: this study was begun without it")
        places = share_this_machine(number) if workers.share_machine else None
        train = HydraTrain(trials, places)
        task = WorkerTask(
            plan,
            train,
            trials.space.fixed,
            FailurePolicy(max_retries=base.sweep.max_retries, stop_after=base.sweep.stop_after_failures),
            places,
            coordinator=None if places is None else os.getpid(),
        )
        launch = functools.partial(self._launch, task, number)
        with reported(plan, base.tracking):
            run_workers(study, lambda: launch(plan, train))
            if base.sweep.confirm.top:
                confirm_best(study, base, train, launch)
                show_confirmation(plan.folder, plan.storage)

    def request(self, arguments: list[str]) -> tuple[TrialConfigs, ExperimentConfig, StudyPlan]:
        """Trials, the settings of one of them, and the plan of a study. Raises LmtrainError for what cannot be one."""
        from lmtrain.sweep.confirm import require_confirmable
        from lmtrain.sweep.setup import sample_points

        space = parse_space(self.settings["params"], arguments)
        trials = TrialConfigs(self._config, self._context, space)
        require_options(self._config, space.distributions)
        base = first_settings(trials, sample_points(space.distributions, self._custom_space()))
        if base.sweep.confirm.top:
            require_confirmable(base, list(space.distributions))
        return trials, base, self._plan(trials, base)

    def _plan(self, trials: TrialConfigs, base: ExperimentConfig) -> StudyPlan:
        from lmtrain.sweep.setup import first_evaluation, plan_study, token_budget

        sampler, pruner = self.settings["sampler"], self.settings["pruner"]
        seed = sampler.seed if sampler.get("seed") is not None else base.seed
        first = first_evaluation(base)
        make_sampler = functools.partial(build_sampler, sampler, int(seed))
        make_pruner = functools.partial(build_pruner, pruner, first=first, budget=token_budget(base) or first)
        make_sampler(0), make_pruner()  # refused here if their settings are wrong
        return plan_study(
            self.settings,
            base,
            trials.space.distributions,
            defaults_within(trials(0, {}), trials.space.distributions),
            Path(self._config.hydra.sweep.dir).absolute(),
            directions=directions_of(self.settings["direction"]),
            grid=is_grid(sampler),
            make_sampler=make_sampler,
            make_pruner=make_pruner,
            extend=self._custom_space(),
        )

    def _custom_space(self) -> Callable[[Trial], None] | None:
        name = self.settings["custom_search_space"]
        return None if name is None else functools.partial(search_function(str(name)), self._config)

    def _launch(self, task: WorkerTask, workers: int, plan: StudyPlan, train: Train) -> Sequence[Any]:
        """Run workers of a plan on whatever launcher is chosen; returns what each returned."""
        task = dataclasses.replace(task, plan=plan, train=train)
        launcher: Launcher = Plugins.instance().instantiate_launcher(
            config=self._config, hydra_context=self._context, task_function=cast(TaskFunction, task)
        )
        jobs = [(*task.fixed, f"hydra.sweep.subdir={WORKER_FOLDER}/{number}") for number in range(workers)]
        try:
            return [job.return_value for job in launcher.launch(jobs, initial_job_idx=0)]
        finally:
            for folder in sorted((plan.folder / WORKER_FOLDER).glob("**"), reverse=True):
                with contextlib.suppress(OSError):  # a worker left something to read
                    folder.rmdir()


class SweepSummary(Callback):
    """Compares the runs of a multirun that is no study at its end: a table here, files and pictures in its folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before its sweeper: ends a dry run of a grid, refuses what cannot fit, deals out cores."""
        if _is_study(config):
            return
        from lmtrain.sweep.sizing import require_room_in_grid

        try:
            if config.sweep.dry_run:
                from lmtrain.sweep.dry_run import show_grid

                show_grid(grid_of(config), Path(config.hydra.sweep.dir))
                raise SystemExit
            if runs_here(config) and (runs := runs_of_grid(config)) is not None:
                require_room_in_grid(runs.by_size())
            settle_workers(config, lambda: _processes_of_grid(config))
        except Exception as error:  # Hydra would make a warning of it
            raise PastHydra(error) from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra when all runs have ended, also when one of them raised."""
        from lmtrain.sweep.summary import sum_up

        sweep_dir = Path(config.hydra.sweep.dir).absolute()
        if config.sweep.dry_run or _is_study(config):
            return  # a study sums up itself
        tracking = cast(TrackingConfig, OmegaConf.to_object(config.tracking))
        on_its_way_out = sys.exception()
        stopped = on_its_way_out is not None and not isinstance(on_its_way_out, Exception)  # maybe between two runs
        if sum_up(sweep_dir, compose.first_objective(config), tracking, stopped=stopped) == "interrupted":
            log.info("the same command with sweep.name=%s goes on", config.sweep.name)


def _processes_of_grid(config: DictConfig) -> int:
    """How many processes make the runs of a multirun that is no study, side by side on this machine."""
    from lmtrain.sweep.core_division import divide_cores
    from lmtrain.sweep.setup import require_data

    runs = runs_of_grid(config)
    first = None if runs is None else runs.first_settings()
    workers = count_workers(config, None, first)
    if runs is None or first is None:
        return workers.number
    most = min(workers.number, len(runs.words))
    if workers.undecided and require_data(runs.swept, first):
        most = divide_cores(first, most)
    share_this_machine(most)
    return most


def _is_study(config: DictConfig) -> bool:
    return str(config.hydra.sweeper._target_) == f"{StudySweeper.__module__}.{StudySweeper.__name__}"


def register_plugins() -> None:
    """Tell Hydra our configs and our sweeper. Safe to call again."""
    compose.register()
    Plugins.instance().register(StudySweeper)


# A launcher's worker process unpickles the callback above before it composes anything, and so comes by here.
register_plugins()
