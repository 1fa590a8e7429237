"""A trial of a study as an experiment of its own: `experiments/NAME.yaml`, which trains it again to the same number."""

from __future__ import annotations

import os
import re
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial

from lmtrain.config import compose
from lmtrain.config.saved import RUN_GROUPS, dump_yaml
from lmtrain.errors import ConfigError, RunFolderError
from lmtrain.run_dir import RunDir, write_atomically
from lmtrain.sweep.reading import ReadStudy, status_of
from lmtrain.sweep.study import attempts_of
from lmtrain.sweep.wording import short_count, short_score

_NOT_OF_THE_RESULT = ("tracking", "resume", "force", "sweep")
"""Where a run is logged, and how it was asked for."""


def export_best(
    study: ReadStudy, name: str | None = None, trial: int | None = None, to: Path | None = None, *, force: bool = False
) -> Path:
    """Write the best trial, or the one numbered `trial`, as `to/NAME.yaml`; returns its path.

    Args:
        name: default: that of the study.
        to: a folder named `experiment`, made if missing. Default: `experiments/` of the checkout, `experiment/` here if
            the package is installed.
        force: replace a file that is there.

    Raises ConfigError or RunFolderError if there is no such trial, it was not completed, its run folder is not here, or
    the file is there already. Nothing is written then.
    """
    chosen = _chosen(study, trial)
    name = _valid(name) if name is not None else _default_name(study, None if trial is None else chosen)
    path = _folder(to) / f"{name}.yaml"
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already: give another name, or replace it with --force")
    text = _experiment(study, chosen, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def command_for(path: Path) -> str:
    """What to type to train the experiment in a file."""
    if path.parent.resolve() == _shipped():
        return f"python -m lmtrain experiment={path.stem}"
    place = os.path.relpath(path.absolute().parent.parent)
    return f"python -m lmtrain --config-dir {shlex.quote(place)} experiment={path.stem}"


def _shipped() -> Path:
    """Where the experiments that come with the program are."""
    return (compose.config_dir() / "experiment").resolve()


def _folder(to: Path | None) -> Path:
    """Where to write. Raises ConfigError for a folder in which Hydra would not find the experiment."""
    if to is None:
        in_checkout = (compose.config_dir() / "experiment").is_symlink() and Path.cwd() == _shipped().parent
        return Path(os.path.relpath(_shipped())) if in_checkout else Path("experiment")
    if to.resolve() != _shipped() and to.name != "experiment":
        raise ConfigError(
            f"--to {to}: an experiment is found in a folder named experiment, such as {to / 'experiment'}"
        )
    return to


def _chosen(study: ReadStudy, number: int | None) -> FrozenTrial:
    """A completed trial."""
    if number is None:
        if study.best is None:
            raise RunFolderError(f"{study.folder}: no trial of the study was completed")
        if len(study.pareto) > 1:
            front = ", ".join(str(trial.number) for trial in study.pareto)
            raise ConfigError(f"several trials are best, each in its way: choose one with --trial ({front})")
        return study.pareto[0]
    found = {trial.number: trial for trial in study.trials}.get(number)
    if found is None:
        raise ConfigError(f"{study.folder} has no trial {number}; there are {len(study.trials)}, counted from 0")
    if found not in study.ranked:
        raise ConfigError(
            f"trial {number} is {status_of(found).replace('_', ' ')}: only a completed trial has a result"
        )
    return found


def _valid(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise ConfigError(f"the name of an experiment is made of letters, digits, - and _, got {name!r}")
    return name


def _default_name(study: ReadStudy, trial: FrozenTrial | None) -> str:
    name = re.sub(r"[^\w-]+", "_", study.name, flags=re.ASCII).strip("_")
    name = name if name[:1].isalpha() else f"study_{name}"
    return name if trial is None else f"{name}_trial_{trial.number}"


def _experiment(study: ReadStudy, trial: FrozenTrial, path: Path) -> str:
    """The text of the file: options of groups, then what differs from what those bring."""
    folder = RunDir(study.folder_of(trial))
    try:
        saved = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        hydra = yaml.safe_load((folder.path / ".hydra/hydra.yaml").read_text(encoding="utf-8"))
    except OSError:
        raise RunFolderError(
            f"trial {trial.number} is not in {folder}: export it where it was trained, from that machine's sweep folder"
        ) from None
    schemas = {
        group: option for entry in saved.pop("defaults") if isinstance(entry, dict) for group, option in entry.items()
    }
    chosen = hydra["hydra"]["runtime"]["choices"]
    groups = [group for group in RUN_GROUPS if group not in _NOT_OF_THE_RESULT]
    shipped = {group: chosen[group] for group in groups if chosen.get(group) in compose.group_options(group)}
    if shipped.get("model") == "auto":
        del shipped["model"]  # the shape it came to is written out
    baseline = yaml.safe_load(dump_yaml(compose.settings_of_options(shipped)))  # tuples become lists, as in `saved`
    # An option from the user's own folder may not be found next time: its group is written out.
    options = {f"override /{group}": shipped.get(group) or schemas[f"override /{group}"] for group in groups}
    content: dict[str, Any] = {"defaults": [{group: option} for group, option in options.items()]}
    for key, value in saved.items():
        if key in _NOT_OF_THE_RESULT:
            continue
        if key not in RUN_GROUPS:
            content |= {key: value} if value != baseline[key] or key in study.parameters else {}
        elif inner := _different(value, baseline[key] if key in shipped else {}, key, study.parameters):
            content[key] = inner
    return _header(study, trial, path) + dump_yaml(content)


def _different(settings: dict[str, Any], baseline: dict[str, Any], group: str, always: list[str]) -> dict[str, Any]:
    """The settings of a group that its option would not bring, and those that were searched."""
    return {
        name: value
        for name, value in settings.items()
        if name not in baseline or baseline[name] != value or f"{group}.{name}" in always
    }


def _header(study: ReadStudy, trial: FrozenTrial, path: Path) -> str:
    values = zip(study.objectives, trial.values or (), strict=True)
    attempts = attempts_of(trial)
    day = f", {datetime.fromtimestamp(attempts[-1]['ended']).astimezone():%Y-%m-%d}" if attempts else ""
    searched = [f"#   {name}: {range}" for name, range in study.space.items()]
    lines = [
        "# @package _global_",
        f"# Trial {trial.number} of the study {study.name}{day}:",
        f"# {', '.join(f'{name} {short_score(value)}' for name, value in values)} after "
        f"{short_count(study.tokens_of(trial))} tokens, to which this trains again on the same machine:",
        "#",
        f"#   {command_for(path)}",
        "#",
        f"# Of {len(study.ended)} trials, which searched",
        *searched,
    ]
    return "\n".join(lines) + "\n"
