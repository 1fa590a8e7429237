"""A study as its readers see it: status, report, export. Opens what is there, creates and changes nothing.

Owns `study.yaml` in a sweep folder, which says what the study is and where it is kept, so that the folder is enough to
read it by. How trials come about is in `study`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from optuna.trial import FrozenTrial, TrialState

from lmtrain.config.search_space import describe
from lmtrain.errors import ConfigError, RunFolderError
from lmtrain.redaction import redact
from lmtrain.run_dir import STUDY_FILE, RunDir, write_atomically
from lmtrain.sweep.storage import is_url, open_storage
from lmtrain.sweep.study import StudyPlan, attempts_of, is_abandoned, lease_of, outcome_of

if TYPE_CHECKING:
    from pandas import DataFrame

KINDS = ("completed", "pruned", "infeasible", "diverged", "failed", "running", "waiting")
"""What a trial can be, in the order a reader cares for."""

_KIND_OF_STATUS = {"early_stopped": "completed", "out_of_memory": "infeasible", "invalid": "infeasible"}
_STATUS_OF_STATE = {TrialState.COMPLETE: "completed", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_TAIL_BYTES = 4096  # of a metrics file; its last record is far shorter


@dataclass(frozen=True, kw_only=True)
class StudyDescription:
    """What `study.yaml` says."""

    name: str
    storage: str  # database URL without its password, or path of a journal file, from the sweep folder if inside it
    objectives: tuple[str, ...]
    directions: tuple[str, ...]  # minimize or maximize
    num_trials: int
    budget_tokens: int | None  # of a whole trial; None if it depends on the text
    space: Mapping[str, str]  # parameter → its range in words


def describe_study(plan: StudyPlan) -> StudyDescription:
    """The description of a plan."""
    inside = not is_url(plan.storage) and Path(plan.storage).is_relative_to(plan.folder)
    return StudyDescription(
        name=plan.name,
        storage=str(Path(plan.storage).relative_to(plan.folder)) if inside else redact(plan.storage),
        objectives=plan.objectives,
        directions=plan.directions,
        num_trials=plan.num_trials,
        budget_tokens=plan.budget_tokens,
        space={name: describe(distribution) for name, distribution in plan.space.items()},
    )


def write_description(plan: StudyPlan) -> None:
    """Write `study.yaml` into the sweep folder."""
    content = {
        key: list(value) if isinstance(value, tuple) else value for key, value in asdict(describe_study(plan)).items()
    }
    write_atomically(plan.folder / STUDY_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def read_description(folder: Path) -> StudyDescription:
    """What the `study.yaml` of a sweep folder says. Raises RunFolderError if there is none."""
    try:
        content: dict[str, Any] = yaml.safe_load((folder / STUDY_FILE).read_text(encoding="utf-8"))
        lists = {key: tuple(content[key]) for key in ("objectives", "directions")}
        return StudyDescription(**content | lists)
    except OSError:
        raise RunFolderError(f"{folder} is not the folder of a study: it has no {STUDY_FILE}") from None
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise RunFolderError(f"{folder / STUDY_FILE} cannot be read: {' '.join(str(error).split())}") from error


def read_study(folder: Path | str, storage: str | None = None) -> ReadStudy:
    """The study of a sweep folder, as it is now; `storage`: where it is kept, if not where `study.yaml` says.

    Raises RunFolderError if the folder has no study, ConfigError if its storage cannot be opened.
    """
    return StudyReader.open(Path(folder).expanduser(), storage).read()


class StudyReader:
    """Reads a study again and again; what has not changed costs little."""

    def __init__(self, folder: Path, description: StudyDescription, storage: str) -> None:
        """`storage` with its password. Raises ConfigError if it cannot be opened or does not hold the study."""
        self.folder = folder
        self.description = description
        self._storage = open_storage(storage, create=False)
        try:
            self._study_id = self._storage.get_study_id_from_name(description.name)
        except KeyError:
            raise ConfigError(f"{redact(storage)} holds no study {description.name}") from None

    @classmethod
    def open(cls, folder: Path, storage: str | None = None) -> StudyReader:
        """As `read_study`."""
        description = read_description(folder)
        where = storage or description.storage
        if is_url(where) and ":***@" in where:
            raise ConfigError(f"{where} needs its password: add --storage URL with it")
        return cls(folder, description, where if is_url(where) else str(folder / where))

    def read(self) -> ReadStudy:
        """The study now. Raises what its storage raises."""
        attributes = self._storage.get_study_user_attrs(self._study_id)
        imported, stopped = int(attributes.get("source", 0)), attributes.get("stopped")
        end = imported + self.description.num_trials
        trials = [
            trial
            for trial in self._storage.get_all_trials(self._study_id, deepcopy=False)
            # An earlier command may have asked for more; what it did stays.
            if trial.number < end or trial.state != TrialState.WAITING
        ]
        return ReadStudy(
            folder=self.folder,
            **{name: getattr(self.description, name) for name in StudyDescription.__dataclass_fields__},
            trials=tuple(trials[imported:]),
            imported=tuple(trials[:imported]),
            stopped=None if stopped is None else str(stopped),
            definition=dict(attributes.get("definition", {})),
        )


def reader_of(plan: StudyPlan) -> StudyReader:
    """Reads the study of a plan. Raises ConfigError as StudyReader does."""
    return StudyReader(plan.folder, describe_study(plan), plan.storage)


@dataclass(frozen=True, kw_only=True, repr=False)
class ReadStudy(StudyDescription):
    """A study at one moment."""

    folder: Path
    trials: tuple[FrozenTrial, ...]  # by number; its own, begun or not
    imported: tuple[FrozenTrial, ...]  # of an earlier study it started from
    stopped: str | None  # why no more trials are begun
    definition: Mapping[str, str] = field(default_factory=dict)  # what its trials share, by dotted key

    def __repr__(self) -> str:
        from lmtrain.sweep.tables import summary

        return f"<study {self.name}: {summary(self)}>"

    @property
    def trials_frame(self) -> DataFrame:
        """The trials as a table by number: status, a column for each parameter and objective, tokens, seconds, folder.

        What a trial does not have is missing (NaN, None); of one that was pruned the last value reported counts.
        """
        import pandas

        columns = ["status", *self.parameters, *self.objectives, "tokens", "seconds", "folder"]
        rows = [
            {
                "status": status_of(trial),
                **trial.params,
                **dict(zip(self.objectives, trial.values or [self.score_of(trial)], strict=False)),
                **{"tokens": self.tokens_of(trial), "seconds": seconds_of(trial), "folder": str(self.folder_of(trial))},
            }
            for trial in self.trials
        ]
        numbers = pandas.Index([trial.number for trial in self.trials], name="number")
        return pandas.DataFrame(rows, index=numbers, columns=columns)

    @property
    def best_params(self) -> dict[str, Any]:
        """Those of the best trial, by the names they have on the command line; empty if none was completed."""
        return {} if self.best is None else dict(self.best.params)

    @cached_property
    def importances(self) -> dict[str, float]:
        """As `landscape.importances`, of the first objective."""
        from lmtrain.sweep.landscape import importances

        return importances(self)

    @cached_property
    def ranked(self) -> list[FrozenTrial]:
        """Trials whose result can be used, best first objective first."""
        usable = (trial for trial in self.by_kind["completed"] if trial.values is not None)
        return sorted(usable, key=lambda trial: (self._losses(trial)[0], trial.number))

    @property
    def best(self) -> FrozenTrial | None:
        """The one with the best first objective."""
        return self.ranked[0] if self.ranked else None

    @cached_property
    def pareto(self) -> list[FrozenTrial]:
        """Of those ranked, the ones that no other beats in one objective without losing in another."""
        return [trial for trial in self.ranked if not any(self._beats(other, trial) for other in self.ranked)]

    @cached_property
    def by_kind(self) -> Mapping[str, list[FrozenTrial]]:
        """The trials of each of `KINDS`, by number."""
        kinds = [(kind_of(trial), trial) for trial in self.trials]
        return {kind: [trial for its, trial in kinds if its == kind] for kind in KINDS}

    @property
    def counts(self) -> Mapping[str, int]:
        """How many trials are of each of `KINDS`."""
        return {kind: len(trials) for kind, trials in self.by_kind.items()}

    @cached_property
    def parameters(self) -> list[str]:
        """What is searched, also what only the trials know of."""
        return list(dict.fromkeys([*self.space, *(name for trial in self.trials for name in trial.params)]))

    @property
    def ended(self) -> list[FrozenTrial]:
        """Trials that are over, by number."""
        return [trial for trial in self.trials if trial.state.is_finished()]

    @property
    def running(self) -> list[FrozenTrial]:
        """Trials that a living worker has."""
        return self.by_kind["running"]

    @property
    def is_over(self) -> bool:
        """Whether nothing runs, nor will."""
        return not self.running and (self.stopped is not None or not self.by_kind["waiting"])

    def folder_of(self, trial: FrozenTrial) -> Path:
        """Its run folder; it need not be there, for the trial may not have come so far, or run elsewhere."""
        return self.folder / f"{trial.number:04d}"

    def tokens_of(self, trial: FrozenTrial) -> int:
        """Tokens it has seen so far."""
        told = outcome_of(trial).get("tokens")
        if told is not None:
            return int(told)
        logged = _last_record(RunDir(self.folder_of(trial)).metrics) if trial.state == TrialState.RUNNING else {}
        return max(int(logged.get("tokens", 0)), *trial.intermediate_values, 0)

    def score_of(self, trial: FrozenTrial) -> float | None:
        """Its first objective: the result, or the latest value reported; None if there is none yet."""
        if trial.values is not None:
            return float(trial.values[0])
        reported = trial.intermediate_values
        return float(reported[max(reported)]) if reported else None

    def _losses(self, trial: FrozenTrial) -> list[float]:
        """Its objectives, all to be made small."""
        signs = (1.0 if direction == "minimize" else -1.0 for direction in self.directions)
        return [sign * value for sign, value in zip(signs, trial.values or (), strict=True)]

    def _beats(self, one: FrozenTrial, other: FrozenTrial) -> bool:
        ours, theirs = self._losses(one), self._losses(other)
        return ours != theirs and all(mine <= its for mine, its in zip(ours, theirs, strict=True))


def status_of(trial: FrozenTrial) -> str:
    """How it stands: waiting, running, completed, early_stopped, pruned, diverged, out_of_memory, invalid or failed.

    A trial whose worker died is waiting: the next worker goes on with it.
    """
    if trial.state.is_finished():
        return str(outcome_of(trial).get("status") or _STATUS_OF_STATE[trial.state])
    return "waiting" if trial.state == TrialState.WAITING or is_abandoned(trial) else "running"


def kind_of(trial: FrozenTrial) -> str:
    """Which of `KINDS` it is."""
    status = status_of(trial)
    return _KIND_OF_STATUS.get(status, status)


def seconds_of(trial: FrozenTrial) -> float:
    """How long workers have been at it, over all attempts."""
    seconds = math.fsum(attempt["ended"] - attempt["begun"] for attempt in attempts_of(trial))
    lease = lease_of(trial)
    return seconds + (time.time() - lease.begun if lease is not None and status_of(trial) == "running" else 0.0)


def _last_record(path: Path) -> dict[str, Any]:
    """The last whole record of a metrics file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            whole = file.read().rpartition(b"\n")[0]  # the last line may be half written
        record: dict[str, Any] = json.loads(whole.rpartition(b"\n")[2])
    except (OSError, ValueError):
        return {}
    return record
