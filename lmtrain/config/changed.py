"""What is worth telling of settings that no words are known of: how they differ from the options nearest to them.

For runs that Python starts. What a command has changed is known from its words: `compose.changed_settings`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from lmtrain.config.compose import NOT_COMPARED, config_dir, default_choices
from lmtrain.config.saved import PRIMARY_CONFIG, RUN_GROUPS, flat_settings, load_yaml, to_yaml
from lmtrain.config.schema import SCHEMAS, ExperimentConfig


def changed_values(config: ExperimentConfig) -> dict[str, Any]:
    """Of each group its option, unless that is the default, and every setting that the option does not bring.

    The option is the shipped one that brings the most of a group's settings. Keys are dotted.
    """
    if config.resume not in (None, "auto"):
        return {}  # the run that is continued has told them already
    values = flat_settings(load_yaml(to_yaml(config)))
    chosen: dict[str, str] = {}
    brought = dict(_root_settings())
    for group in RUN_GROUPS:
        its = {key: value for key, value in values.items() if key.startswith(f"{group}.")}
        default = default_choices()[group]
        options = {name: settings for name, (schema, settings) in _options(group).items() if schema == values[group]}
        if options:
            nearest = min(options, key=lambda name: (_differences(its, options[name]), name != default))
            chosen |= {group: nearest} if nearest != default else {}
            brought |= options[nearest]
    settings = {key: value for key, value in values.items() if key not in RUN_GROUPS and brought.get(key) != value}
    return {key: value for key, value in (chosen | settings).items() if key.split(".")[0] not in NOT_COMPARED}


def _differences(some: Mapping[str, Any], others: Mapping[str, Any]) -> int:
    return sum(others.get(key) != value for key, value in some.items())


@functools.cache
def _options(group: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The shipped options of a group: name → the schema's name and all settings, by dotted key."""
    options = {}
    for path in sorted((config_dir() / group).glob("*.yaml")):
        own = load_yaml(path.read_text(encoding="utf-8")) or {}
        schema = next((name for name in own.pop("defaults", ()) if name in SCHEMAS[group]), None)
        if schema is not None:
            settings = _defaults_of(SCHEMAS[group][schema]) | own
            options[path.stem] = schema.lstrip("_"), flat_settings({group: settings})
    return options


def _defaults_of(schema: type[Any]) -> dict[str, Any]:
    """What a schema says of itself; tuples as lists, which YAML has."""
    fields = dataclasses.fields(schema)
    known = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


@functools.cache
def _root_settings() -> Mapping[str, Any]:
    """The settings that belong to no group."""
    content = load_yaml((config_dir() / f"{PRIMARY_CONFIG}.yaml").read_text(encoding="utf-8"))
    return _defaults_of(ExperimentConfig) | {key: content[key] for key in content if key not in ("defaults", "hydra")}
