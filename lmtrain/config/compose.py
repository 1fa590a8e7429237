"""The seam to Hydra: what it is told before it composes, and how its result becomes an `ExperimentConfig`.

Owns the registration of schemas and resolvers, the place of the config folder, and what is read from Hydra about
the job at hand. Nothing below `run.py` sees Hydra or OmegaConf.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lmtrain.config.launch import processes_of
from lmtrain.config.saved import OPTIONS_OF_EARLIER_RUNS, PRIMARY_CONFIG, RUN_GROUPS, SAVED_CONFIG, load_yaml
from lmtrain.config.schema import SCHEMAS, ExperimentConfig
from lmtrain.config.study_sweeper import register_sweeper
from lmtrain.errors import ConfigError, RunFolderError
from lmtrain.origin import Origin
from lmtrain.redaction import redact

NOT_COMPARED = ("resume", "model_store", "sweep", "tracking")
"""Settings and groups in which runs differ without being different experiments."""


def config_dir() -> Path:
    """The folder of the shipped configs: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


class ShippedConfigs(SearchPathPlugin):
    """Makes the shipped groups available whatever primary config is used (a run's own, for `resume`)."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider=PRIMARY_CONFIG, path=f"file://{config_dir()}")


def register() -> None:
    """Tell Hydra our schemas, resolvers and config folder. Safe to call again."""
    store = ConfigStore.instance()
    store.store(name="_experiment", node=ExperimentConfig, replace=True)
    for group, options in SCHEMAS.items():
        for name, schema in options.items():
            store.store(group=group, name=name, node=schema, replace=True)
    for (group, name), settings in OPTIONS_OF_EARLIER_RUNS.items():
        store.store(group=group, name=name, node=settings, replace=True)
    OmegaConf.register_resolver("run_dir", _run_dir, replace=True)
    OmegaConf.register_resolver("run_number", lambda number: f"{number:04d}", replace=True)
    OmegaConf.register_resolver("log_level", lambda verbose: "DEBUG" if verbose is True else "INFO", replace=True)
    Plugins.instance().register(ShippedConfigs)
    register_sweeper()


def _run_dir(resume: str | None, fresh: str) -> str:
    """`hydra.run.dir`: the folder to continue in, or a fresh one."""
    return fresh if resume in (None, "auto") else str(resume)


def group_options(group: str) -> list[str]:
    """Names of the shipped options of a group, without the bare schemas."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml") if path.stem[0] != "_")


def compose_config(overrides: Sequence[str], run: Path | None = None) -> ExperimentConfig:
    """The checked settings that a training command of these words would have; for the commands that are not Hydra's.

    With `run`, those of that run folder, changed by the words. Raises LmtrainError, or an error that `explain` puts
    into words.
    """
    register()
    folder, name = primary_config(overrides) if run is None else _saved_config(run)
    refuse_groups(overrides, saved=name == SAVED_CONFIG)
    with composing_from(folder or str(config_dir())):
        return parse_config(compose(name, list(overrides)))


def settings_of_options(options: Mapping[str, str]) -> dict[str, Any]:
    """The settings that options of groups bring by themselves, nested; what they leave to the user is `???`."""
    register()
    with composing_from(str(config_dir())):
        composed = compose(PRIMARY_CONFIG, [f"{group}={option}" for group, option in options.items()])
    return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))


@contextlib.contextmanager
def composing_from(folder: str) -> Iterator[None]:
    """While entered, Hydra composes from a folder, also inside a program that is a Hydra application itself."""
    application = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(folder):
            yield
    finally:
        GlobalHydra.instance().hydra = application


def default_run_dir(resume: str | None) -> Path:
    """The run folder of a command that names none, at this second: `hydra.run.dir` of the shipped config."""
    setup_globals()
    register()
    config = OmegaConf.load(config_dir() / f"{PRIMARY_CONFIG}.yaml")
    config.resume = resume
    return Path(config.hydra.run.dir)


def primary_config(overrides: Sequence[str]) -> tuple[str | None, str]:
    """Folder and name of the config to start from: the shipped one, or that of the run `resume=RUN` names."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") != "resume":
            continue
        if not value.strip("'\""):
            raise ConfigError("resume= names no run folder; write resume=RUN or resume=auto, or leave it out")
        if value not in ("null", "auto"):
            return _saved_config(Path(value).expanduser(), f"{override}: ")
    return None, PRIMARY_CONFIG


def _saved_config(run: Path, typed: str = "") -> tuple[str, str]:
    if not (run / f"{SAVED_CONFIG}.yaml").is_file():
        raise RunFolderError(f"{typed}there is no run folder {run} (it would hold config.yaml)")
    return str(run.absolute()), SAVED_CONFIG


def refuse_groups(overrides: Sequence[str], *, saved: bool) -> None:
    """Raise ConfigError for what Hydra would take, or refuse without naming the group.

    Every group needs an option. A `saved` config states every setting, and they would win over those an option brings.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("~+")
        if group in SCHEMAS and (key.startswith("~") or value == "null"):
            raise ConfigError(f"{override}: {group} must be one of {', '.join(group_options(group))}")
        if saved and key in (*SCHEMAS, "experiment"):
            raise ConfigError(
                f"{override}: a run's own config takes settings such as lr=... or model.d_ff=..., no options"
            )


def parse_config(config: DictConfig) -> ExperimentConfig:
    """The composed settings as plain dataclasses, checked.

    Raises ConfigError for settings that break a rule, OmegaConf's errors for missing or mistyped ones.
    """
    _check_keys(config)
    parsed = OmegaConf.to_object(config)
    assert isinstance(parsed, ExperimentConfig), type(parsed)
    return parsed


def _check_keys(config: DictConfig, prefix: str = "") -> None:
    """`+key=value` gets past Hydra's check of names; no setting of ours may come in that way."""
    schema = OmegaConf.get_type(config)
    assert schema is not None
    fixed = dataclasses.is_dataclass(schema)  # else names are the user's, as of the sources of a mixture
    known = [field.name for field in dataclasses.fields(schema)] if fixed else list(map(str, config))
    for key in known:
        if key not in config.keys():  # noqa: SIM118 (a missing value is not `in` its config)
            raise ConfigError(f"{prefix}{key} must be set: ~{prefix}{key} cannot remove it")
    for key in map(str, config):
        if key not in known:
            raise ConfigError(f"there is no setting {prefix + key!r}; +{prefix}{key} cannot add one")
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config[key]):
            _check_keys(config[key], f"{prefix}{key}.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What Hydra knows about the run at hand, as plain values."""

    run_dir: Path
    sweep_dir: Path | None  # None: not part of a multirun
    overrides: tuple[str, ...]  # as typed or chosen by the sweeper, without those of Hydra itself
    choices: Mapping[str, str]  # option of each group
    moved_from: Path | None  # the working folder, if Hydra has changed it
    processes: int = 1  # that make runs of the multirun on this machine, this one included


def current_job() -> Job:
    """The job Hydra is running in this process."""
    hydra = HydraConfig.get()
    return Job(
        run_dir=Path(hydra.runtime.output_dir),
        sweep_dir=Path(hydra.sweep.dir).absolute() if hydra.mode == RunMode.MULTIRUN else None,
        overrides=tuple(str(override) for override in hydra.overrides.task),
        processes=processes_of(hydra),
        moved_from=Path(hydra.runtime.cwd) if hydra.job.chdir else None,
        choices={str(group): str(option) for group, option in hydra.runtime.choices.items()},
    )


def first_objective(config: DictConfig) -> str:
    """The name of what the runs of a multirun are ranked by."""
    return str(config.objective[0] if OmegaConf.is_list(config.objective) else config.objective)


def origin_of(config: DictConfig, job: Job) -> Origin:
    """What the job's run folder and trackers are told of where the run comes from."""
    return Origin(
        changed=changed_settings(config, job),
        overrides=job.overrides,
        sweep_dir=job.sweep_dir,
        files=hydra_folder(config),
    )


def hydra_folder(config: DictConfig) -> dict[str, str]:
    """Texts of the files Hydra keeps of a job, by path inside the run folder.

    Written by us once the run owns its folder: Hydra itself would write them over those of a run already there.
    """
    files = {"config": config, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    return {f".hydra/{name}.yaml": redact(OmegaConf.to_yaml(content)) for name, content in files.items()}


def changed_settings(config: DictConfig, job: Job) -> dict[str, Any]:
    """Group choices that are not the default, and settings that differ from what the choices bring, as flat keys.

    This is what is worth comparing between runs; everything else is the same for all who chose alike.
    """
    if config.resume not in (None, "auto"):
        return {}  # the run that is continued has told them already
    choices = {group: job.choices[group] for group in RUN_GROUPS if group in job.choices}
    baseline = _flat(_compose_choices(tuple(sorted(choices.items()))))
    changed = {key: value for key, value in _flat(config).items() if baseline.get(key) != value}
    unusual = {group: option for group, option in choices.items() if option != default_choices().get(group)}
    return {key: value for key, value in (unusual | changed).items() if key.split(".")[0] not in NOT_COMPARED}


@functools.lru_cache
def default_choices() -> dict[str, str]:
    """The option of each group that is taken when none is named."""
    text = (config_dir() / f"{PRIMARY_CONFIG}.yaml").read_text(encoding="utf-8")
    return {
        group: option
        for entry in load_yaml(text)["defaults"]
        if isinstance(entry, dict)
        for group, option in entry.items()
    }


@functools.lru_cache(maxsize=64)
def _compose_choices(choices: tuple[tuple[str, str], ...]) -> DictConfig:
    loader = GlobalHydra.instance().config_loader()
    composed = loader.load_configuration(
        config_name=PRIMARY_CONFIG,
        overrides=[f"{group}={option}" for group, option in choices],
        run_mode=RunMode.RUN,
    )
    return without_hydra(composed)


def without_hydra(config: DictConfig) -> DictConfig:
    """A composed config without Hydra's own part, as a task gets it."""
    task_config = copy.deepcopy(config)
    with open_dict(task_config):
        del task_config["hydra"]
    return task_config


def _flat(config: DictConfig) -> dict[str, Any]:
    def walk(prefix: str, node: Any) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        children = (walk(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items())
        return {key: value for child in children for key, value in child.items()}

    return walk("", OmegaConf.to_container(config, resolve=False))
