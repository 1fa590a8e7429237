"""The study that the workers of a sweep share: its trials, who works on which, and how they ended.

Owns what is kept in Optuna's storage. Knows neither Hydra nor how a trial is trained.

A trial is there from the start, WAITING; a worker claims it (RUNNING), and a trial whose worker died is put back, with
its number, parameters and reports. So the storage alone says what is left to do, whoever asks and after any crash.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from lmtrain.errors import TextChangedError
from lmtrain.sweep.lease import RENEW_OFTEN_SECONDS, Lease, keep_renewing
from lmtrain.sweep.sampling import SamplerPerTrial
from lmtrain.sweep.storage import is_url, open_storage

OPEN = (TrialState.WAITING, TrialState.RUNNING)
"""States of trials that have not ended."""

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
"""... and of those that have."""

FILLING_SECONDS = 2.0
"""Within this time a machine that is filling a study adds a trial."""

# Attributes of trials, and of studies.
_LEASE, _OUTCOME, _ATTEMPTS = "lease", "outcome", "attempts"
_DEFINITION, _STOPPED, _SOURCE, _TEXTS = "definition", "stopped", "source", "texts"


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What a study searches and how; the same in each of its workers."""

    name: str
    storage: str  # database URL, or path of a journal file
    folder: Path  # where the runs are, here
    directions: tuple[Literal["minimize", "maximize"], ...]
    space: Mapping[str, BaseDistribution]
    num_trials: int  # in all, over every call of the command
    starting_points: Sequence[Mapping[str, Any]] = ()  # parameters of the first trials; a missing one is sampled
    make_sampler: Callable[[int], optuna.samplers.BaseSampler] = field(
        default=lambda number: optuna.samplers.RandomSampler(seed=number)
    )
    """From the number of a trial, which its seed must follow from."""
    make_pruner: Callable[[], optuna.pruners.BasePruner] = optuna.pruners.NopPruner
    extend: Callable[[optuna.Trial], None] | None = None  # suggests further parameters
    objectives: tuple[str, ...] = ("val/loss",)  # names, one for each direction; for readers
    budget_tokens: int | None = None  # of a whole trial, if known; for readers


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended, as the sampler and the reader are told."""

    state: TrialState
    values: tuple[float, ...] | None = None
    infeasible: bool = False  # it cannot be done at all, so the sampler should keep away
    details: Mapping[str, Any] = field(default_factory=dict)  # status, step, tokens, seconds, folder, reason


@dataclass(frozen=True, kw_only=True)
class FailurePolicy:
    """What becomes of trials that raise."""

    max_retries: int = 1  # further attempts at a trial
    stop_after: int = 3  # when so many trials, the first to end, failed alike, the study stops


class LeaseLost(Exception):
    """Another worker has taken the trial over: this one was thought dead."""


class SharedStudy:
    """A study in its storage, as one process sees it."""

    def __init__(self, plan: StudyPlan) -> None:
        """Opens the study and creates it if missing. Raises ConfigError if the storage cannot be used."""
        self.plan = plan
        self._storage = open_storage(plan.storage)
        self._created = False
        try:
            self._load()  # leaves no trace
        except KeyError:
            with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):  # another process was faster
                study = optuna.create_study(study_name=plan.name, storage=self._storage, directions=plan.directions)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    study.set_metric_names(list(plan.objectives))  # for other readers, optuna-dashboard among them
                self._created = True

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials of the plan by number, all or those in some states."""
        found, end = self._load().get_trials(deepcopy=False, states=states or None), self._end
        return [trial for trial in found if trial.number < end]

    @property
    def study(self) -> optuna.Study:
        """The study for reading."""
        return self._load()

    @property
    def imported(self) -> int:
        """How many trials, the first, come from an earlier study; they are not among the plan's own."""
        return int(self._load().user_attrs.get(_SOURCE, 0))

    @property
    def stopped(self) -> str | None:
        """Why no more trials shall be begun, if that was decided."""
        reason = self._load().user_attrs.get(_STOPPED)
        return None if reason is None else str(reason)

    def stop(self, reason: str | None) -> None:
        """Begin no more trials, in any worker; None takes that back."""
        self._load().set_user_attr(_STOPPED, reason)

    def define(self, definition: Mapping[str, str]) -> list[str]:
        """Note what the study is, the first time; later return what differs from that: `key old → new` each."""
        study = self._load()
        known = study.user_attrs.get(_DEFINITION)
        if known is None:
            study.set_user_attr(_DEFINITION, dict(definition))
            return []
        keys = dict.fromkeys([*known, *definition])
        return [
            f"{key} {known.get(key)} → {definition.get(key)}" for key in keys if known.get(key) != definition.get(key)
        ]

    def require_texts(self, texts: Mapping[str, str]) -> None:
        """Note the fingerprints of texts by their names; raise TextChangedError if one differs from an earlier one."""
        study = self._load()
        known: dict[str, str] = study.user_attrs.get(_TEXTS, {})
        for name, fingerprint in texts.items():
            if known.get(name, fingerprint) != fingerprint:
                raise TextChangedError(
                    f"{name} has changed since this study began, and its trials would not compare: "
                    "put the text back, or begin another study with sweep.name=..."
                )
        if not texts.keys() <= known.keys():
            study.set_user_attr(_TEXTS, {**known, **texts})

    def add_missing(self, earlier: Sequence[FrozenTrial] = ()) -> None:
        """See to it that all trials of the plan are there, after those of an `earlier` study that fit the space."""
        if is_url(self.plan.storage) and not self._created:
            self._wait_for_another_machine()
        with self._alone():
            study = self._load()
            known = len(study.get_trials(deepcopy=False))
            fitting = [copy for trial in earlier if (copy := imported_copy(trial, self.plan.space)) is not None]
            if fitting and not known:
                study.set_user_attr(_SOURCE, len(fitting))
            study.add_trials(fitting[known : self.imported])  # the rest, if a kill came in between
            for _ in range(len(study.get_trials(deepcopy=False)), self._end):
                study.add_trial(optuna.create_trial(state=TrialState.WAITING))

    def claim(self, worker: int = 0) -> optuna.Trial | None:
        """The next trial for this process, its parameters chosen; None if all have ended or are being worked on.

        Puts the trials of dead workers back first: they have the lowest numbers and so come first.
        """
        with self._alone():
            self._put_back_abandoned()
            trial_id = self._take_waiting()
            if trial_id is None:
                return None
            self._storage.set_trial_user_attr(trial_id, _LEASE, Lease.of_this_process(worker).as_dict())
        return self._choose(trial_id)

    @contextlib.contextmanager
    def keep(self, trial: optuna.Trial) -> Iterator[None]:
        """Hold the lease while entered: other machines hear now and then that this process is alive."""
        with keep_renewing(lambda: self.require_lease(trial)):
            yield

    def require_lease(self, trial: optuna.Trial) -> None:
        """Raise LeaseLost if the trial is no longer this process's; else renew the lease, if it is time."""
        attributes = self._storage.get_trial(trial._trial_id).user_attrs.get(_LEASE)
        lease = None if attributes is None else Lease(**attributes)
        if lease is None or not lease.is_of_this_process():
            raise LeaseLost(f"trial {trial.number} was taken over by another worker")
        if lease.age > RENEW_OFTEN_SECONDS:
            self._storage.set_trial_user_attr(trial._trial_id, _LEASE, lease.renewed_now().as_dict())

    def put_back(self, trial: optuna.Trial) -> None:
        """Leave the trial to whoever claims it next."""
        self.require_lease(trial)
        self._note_attempt(trial._trial_id)
        self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def tell(self, trial: optuna.Trial, outcome: Outcome) -> None:
        """End the trial."""
        self.require_lease(trial)
        self._note_attempt(trial._trial_id)
        trial.set_user_attr(_OUTCOME, dict(outcome.details))
        if outcome.infeasible:
            trial.set_constraint("feasible", 1.0)
        trial.study.tell(trial, state=outcome.state, values=outcome.values)

    def is_done(self) -> bool:
        """Whether every trial of the plan has ended."""
        return not self.trials(*OPEN)

    def has_work(self) -> bool:
        """Whether a worker that starts now would find a trial."""
        return any(trial.state == TrialState.WAITING or is_abandoned(trial) for trial in self.trials(*OPEN))

    # ------------------------------------------------------------------------------------------- inside

    @property
    def _end(self) -> int:
        """One past the number of the plan's last trial."""
        return self.imported + self.plan.num_trials

    def _load(self) -> optuna.Study:
        """The study with nothing remembered of earlier looks."""
        return optuna.load_study(study_name=self.plan.name, storage=self._storage)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other processes of this folder out. Other machines are held apart by the storage itself."""
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.plan.folder / ".claim.lock"):
            yield

    def _wait_for_another_machine(self) -> None:
        """Let whoever has just created the study fill it; return when it is full or nobody adds to it any more."""
        before = -1
        while before < (now := len(self._load().get_trials(deepcopy=False))) < self._end:
            before = now
            time.sleep(FILLING_SECONDS)

    def _put_back_abandoned(self) -> None:
        for trial in self.trials(TrialState.RUNNING):
            if is_abandoned(trial):
                self._note_attempt(trial._trial_id)
                self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def _take_waiting(self) -> int | None:
        for trial in self.trials(TrialState.WAITING):
            # False: a worker of another machine was faster.
            if self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                return int(trial._trial_id)
        return None

    def _choose(self, trial_id: int) -> optuna.Trial:
        """The trial with a value for each parameter: kept, given, or sampled."""
        number = self._storage.get_trial(trial_id).number
        point = number - self.imported
        if point < len(self.plan.starting_points):
            self._storage.set_trial_system_attr(trial_id, "fixed_params", dict(self.plan.starting_points[point]))
        study = optuna.load_study(
            study_name=self.plan.name,
            storage=self._storage,
            sampler=SamplerPerTrial(self.plan.make_sampler),
            pruner=self.plan.make_pruner(),
        )
        trial = optuna.Trial(study, trial_id)
        for name, distribution in self.plan.space.items():
            trial._suggest(name, distribution)
        if self.plan.extend is not None:
            self.plan.extend(trial)
        return trial

    def _note_attempt(self, trial_id: int) -> None:
        """Keep who worked on a trial from when to when; the lease is overwritten by the next."""
        trial = self._storage.get_trial(trial_id)
        lease = trial.user_attrs.get(_LEASE)
        if lease is not None:
            mine = Lease(**lease).is_of_this_process()
            ended = time.time() if mine else lease["renewed"]
            attempt = {"worker": lease["worker"], "host": lease["host"], "begun": lease["begun"], "ended": ended}
            self._storage.set_trial_user_attr(trial_id, _ATTEMPTS, [*trial.user_attrs.get(_ATTEMPTS, []), attempt])


def imported_copy(trial: FrozenTrial, space: Mapping[str, BaseDistribution]) -> FrozenTrial | None:
    """A trial of another study as a study of this space takes it; None if it does not fit or has no result."""
    ended = trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    if not ended or not all(name in trial.params and _lies_in(space[name], trial.params[name]) for name in space):
        return None
    return optuna.create_trial(
        state=trial.state,
        values=trial.values,
        params={name: trial.params[name] for name in space},
        distributions=dict(space),
        intermediate_values=trial.intermediate_values,
        user_attrs={_OUTCOME: {**outcome_of(trial), "imported": True}},
        system_attrs={key: value for key, value in trial.system_attrs.items() if key.startswith("constraints")},
    )


def _lies_in(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:  # no such choice, or no number
        return False


def outcome_of(trial: FrozenTrial) -> dict[str, Any]:
    """The details a trial was ended with; empty while it has not."""
    return dict(trial.user_attrs.get(_OUTCOME, {}))


def lease_of(trial: FrozenTrial) -> Lease | None:
    """Who works or worked on a trial last."""
    lease = trial.user_attrs.get(_LEASE)
    return None if lease is None else Lease(**lease)


def attempts_of(trial: FrozenTrial) -> list[dict[str, Any]]:
    """Who worked on a trial: worker, host, begun and ended (seconds since the epoch) of each attempt."""
    return list(trial.user_attrs.get(_ATTEMPTS, []))


def is_abandoned(trial: FrozenTrial) -> bool:
    """Whether a trial is marked as running, and nobody runs it."""
    lease = lease_of(trial)
    if trial.state != TrialState.RUNNING:
        return False
    # Between RUNNING and the lease a worker needs a moment; one that died there leaves no lease.
    return lease.is_dead() if lease is not None else not _begun_lately(trial)


def _begun_lately(trial: FrozenTrial) -> bool:
    begun = trial.datetime_start
    return begun is not None and time.time() - begun.timestamp() < 30.0
