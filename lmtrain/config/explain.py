"""What to tell a user whose request could not be composed: the rule, the value and the nearest valid name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError

from lmtrain.config.schema import SCHEMAS, AutoModelConfig, ExperimentConfig
from lmtrain.errors import LmtrainError

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
"""What Hydra and OmegaConf raise for a request that cannot be composed."""

REQUEST_ERRORS = (*COMPOSITION_ERRORS, MarkedYAMLError, OSError, ValueError)
"""... and what else comes of a request: unreadable files, flags that exclude each other."""


UNION = re.compile(r"Value ('.*') of .*incompatible with type hint '.*Union\[(bool|int), Literal\[(\w+)\]\]")
"""What OmegaConf says of a value that is of none of two types: in words of Python, which a user did not write."""

OF_UNION = {"bool": "true, false", "int": "a whole number"}


class PastHydra(BaseException):
    """Carries an error out of what Hydra calls without Hydra announcing it in its own words."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def explain(error: BaseException) -> str:
    """One or two lines for an error of a request, before any run has started."""
    for cause in _chain(error):
        message = _explain_one(cause)
        if message is not None:
            return message
    return " ".join(str(error).split("\n")[:2]).strip()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the innermost first: that one knows the key and the value."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return reversed(found)


def _explain_one(error: BaseException) -> str | None:
    match error:
        case LmtrainError():
            return str(error)
        case MissingConfigException(missing_cfg_file=str() as missing) if plugin := _plugin_of(missing):
            return f"{missing} needs a plugin that is not installed: pip install 'lmtrain[{plugin}]'"
        case MissingConfigException(missing_cfg_file=str() as missing) if error.options:
            group, _, option = missing.rpartition("/")
            return f"{group} has no option {option!r}{nearest(option, _public(error.options))}"
        case OverrideParseException() if found := re.search(r"while evaluating '[^']*': (.+)", str(error)):
            return f"{error.override}: {found[1]}"
        case OverrideParseException():
            return f"cannot read the argument {error.override!r}: write key=value, or the name of a command"
        case ConfigKeyError() | ConfigAttributeError() if isinstance(error.parent_node, DictConfig):
            return _unknown_key(str(error.full_key), error.parent_node)
        case MissingMandatoryValue():
            return f"{error.full_key} must be set: add {error.full_key}=VALUE"
        case ValidationError() if error.full_key and (found := UNION.search(str(error))):
            return f"{error.full_key} must be {OF_UNION[found[2]]} or {found[3]}, got {found[1]}"
        case ValidationError() if error.full_key:  # the innermost one does not know its key yet
            return f"{error.full_key}: {str(error).splitlines()[0]}"
        case HydraException() if found := re.search(r"Could not override '([^']+)'", str(error)):
            return _unknown_key(found[1].split("@")[0])
        case HydraException() if found := re.search(r"Error merging override ~(\S+)", str(error)):
            return f"{found[1]} must be set: ~{found[1]} cannot remove it"
        case HydraException() if found := re.search(r"Ambiguous value for argument '([^']+)'", str(error)):
            return f"{found[1]} names several values: add --multirun for a run of each; a list is written key=[a,b]"
        case MarkedYAMLError(problem_mark=mark) if mark is not None:
            return f"cannot read {mark.name}, line {mark.line + 1}: {error.problem}"
        case OSError(filename=str() as path):
            return f"cannot use {path}: {error.strerror}"
    return None


def _plugin_of(missing: str) -> str | None:
    """The extra of ours that brings this option of hydra/launcher, if one does."""
    return next((name for name in ("submitit", "ray") if re.fullmatch(rf"hydra/launcher/{name}(_\w+)?", missing)), None)


def _unknown_key(key: str, parent: DictConfig | None = None) -> str:
    group, _, name = key.rpartition(".")
    if not group or parent is None:
        candidates = [*ExperimentConfig.__dataclass_fields__, "experiment"]
        return f"there is no setting {key!r}{nearest(name, candidates)}"
    if group in SCHEMAS and OmegaConf.get_type(parent) not in SCHEMAS[group].values():
        bare = " or ".join(SCHEMAS[group])
        return f"{key} has no type: an option of {group} starts with defaults: [SCHEMA, _self_], SCHEMA being {bare}"
    if OmegaConf.get_type(parent) is AutoModelConfig:
        return f"{key} cannot be set with model=auto, which chooses the shape by the memory found; name a preset"
    return f"there is no setting {key!r}{nearest(name, map(str, parent), group)}"


def _public(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.startswith("_")]


def nearest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """What to say after a name that is not there: the one that was meant, or all there are."""
    names = sorted(candidates)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?"
    return f"; there are {', '.join(names)}" if names else ""
