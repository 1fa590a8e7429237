"""What a study takes over from an earlier one, for its sampler to learn from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial

from lmtrain.errors import ConfigError
from lmtrain.redaction import redact
from lmtrain.sweep.reading import read_description, read_study
from lmtrain.sweep.study import StudyPlan, imported_copy

log = logging.getLogger(__name__)

HOW_IT_SEARCHES = ("search ", "direction", "sampler", "pruner")
"""How the lines of a definition begin that do not say what a trial trains."""

_MOST_DIFFERENCES = 4  # told, of those there are


def trials_to_learn_from(source: str | None, plan: StudyPlan, definition: Mapping[str, str]) -> list[FrozenTrial]:
    """The ended trials of the study of a sweep folder that fit the space of `plan`, by number; none of None.

    Raises RunFolderError if the folder holds no study, ConfigError if that study has nothing for this one.
    """
    if source is None:
        return []
    folder = Path(source)
    if folder.absolute() == plan.folder:
        raise ConfigError(f"sweep.start_from={folder} is this study itself, which goes on without being told")
    same_server = redact(plan.storage) == read_description(folder).storage
    earlier = read_study(folder, plan.storage if same_server else None)  # ours has the password
    found, wanted = (_objectives(study.objectives, study.directions) for study in (earlier, plan))
    if wanted != found:
        raise ConfigError(f"sweep.start_from={folder}: its objective is {found}, that of this study {wanted}")
    fitting = [trial for trial in earlier.ended if imported_copy(trial, plan.space) is not None]
    if not fitting:
        raise ConfigError(
            f"sweep.start_from={folder}: none of its {len(earlier.ended)} ended trials fits this space; "
            f"it searched {_space(earlier.space)}"
        )
    log.info("sweep.start_from=%s: %d of its %d ended trials fit this space", folder, len(fitting), len(earlier.ended))
    differences = _differences(earlier.definition, definition)
    if differences:
        shown = "; ".join(differences[:_MOST_DIFFERENCES]) + ("; …" if len(differences) > _MOST_DIFFERENCES else "")
        log.warning("its trials were of other settings and may mislead the sampler: %s", shown)
    return fitting


def _objectives(names: Sequence[str], directions: Sequence[str]) -> str:
    return ", ".join(f"{name} ({direction})" for name, direction in zip(names, directions, strict=True))


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    keys = [key for key in {**old, **new} if not key.startswith(HOW_IT_SEARCHES)]
    return [f"{key} {old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _space(space: Mapping[str, str]) -> str:
    return ", ".join(f"{name} in {words}" for name, words in space.items())
