"""`config.yaml` of a run folder: every setting of a run, as a Hydra primary config of its own.

`python -m lmtrain --config-dir RUN --config-name config` repeats the run, with overrides if wanted. No Hydra here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

import yaml

from lmtrain.config.schema import SCHEMAS, AutoModelConfig, ExperimentConfig, MixtureConfig, ModelConfig

PRIMARY_CONFIG = "lmtrain"  # conf/lmtrain.yaml
SAVED_CONFIG = "config"  # config.yaml in a run folder
RUN_GROUPS = tuple(group for group in SCHEMAS if group != "sweep")
"""The groups whose values are settings of a run; `sweep` and `experiment` only change those."""

OPTIONS_OF_EARLIER_RUNS: dict[tuple[str, str], dict[str, Any]] = {
    ("tracking", "_mlflow"): {"mlflow": True},
    ("tracking", "_none"): {},
}
"""Schemas that the `config.yaml` of runs made by earlier versions begins with, and what they stand for now."""


def to_yaml(config: ExperimentConfig) -> str:
    """The text of `config.yaml`: the groups by their bare schema, then every value."""
    names = {schema: name for options in SCHEMAS.values() for name, schema in options.items()}
    overrides = [{f"override /{group}": names[type(getattr(config, group))]} for group in RUN_GROUPS]
    sources = config.data.sources if isinstance(config.data, MixtureConfig) else {}
    added = [{f"/data@data.sources.{name}": names[type(source)]} for name, source in sources.items()]
    values = _plain(dataclasses.asdict(config))
    del values["sweep"]
    content = {"defaults": [PRIMARY_CONFIG, *added, *overrides, "_self_"]} | values | {"resume": None}
    return dump_yaml(content)


def dump_yaml(content: dict[str, Any]) -> str:
    """YAML that OmegaConf reads back as the same values, in the order given."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_yaml(text: str) -> Any:
    """The plain values of a YAML text, by PyYAML's C parser where it was built with it: seven times as fast.

    Raises yaml.YAMLError.
    """
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def flat_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.yaml` holds, by dotted key; the chosen schemas under the names of their groups."""
    flat: dict[str, Any] = {}
    for override in content.get("defaults", ()):
        if isinstance(override, Mapping):
            flat |= {re.sub("^(override )?/(data@)?", "", key): str(name).lstrip("_") for key, name in override.items()}
    return flat | _flat_values("", {key: value for key, value in content.items() if key != "defaults"})


PATHS = frozenset(
    [
        *("data.path", "data.val_path", "data.test_path", "data.target_path", "data.cache_dir", "tokenizer.path"),
        *("data.val_target_path", "data.test_target_path", "model_store"),
    ]
)
"""Where a machine keeps models and what a run reads: sums are checked, not places."""

WATCHING = PATHS | {
    *("trainer.time_limit", "trainer.log_every", "trainer.checkpoint_every", "trainer.keep_checkpoints"),
    *("trainer.sample_tokens", "trainer.diagnostics", "trainer.diagnostics_every", "trainer.profile"),
}
"""Settings that no result depends on: those, and how a run is watched."""

DIVIDING = {"parallel.strategy", "parallel.reshard_after_forward", "parallel.cpu_offload", "precision.tf32"}
"""Settings that results depend on by rounding and by the random numbers of dropout only."""

FREE_ON_RESUME = (
    WATCHING
    | DIVIDING
    | {
        *("trainer.max_steps", "trainer.max_epochs", "trainer.max_tokens", "trainer.patience", "trainer.min_delta"),
        *("trainer.eval_every", "trainer.eval_every_tokens", "trainer.eval_batches"),
    }
)
"""Settings a resumed run may change: those, its budget, and how it is divided among processes."""

UNSEEN_IN_RESULTS = WATCHING | DIVIDING | {"parallel.num_threads", "force", "resume"}
"""Settings that two trials of one study may differ in and still compare, but for rounding."""


def with_choices_of(saved_text: str, config: ExperimentConfig) -> ExperimentConfig:
    """`config`, with what the run of this `config.yaml` took where `config` leaves it to the machine."""
    saved = load_yaml(saved_text)
    model, precision, parallel, trainer = config.model, config.precision, config.parallel, config.trainer
    if isinstance(model, AutoModelConfig):
        model, _ = saved_model(saved_text)
    if precision.format == "auto":
        precision = dataclasses.replace(precision, format=saved["precision"]["format"])
    if trainer.compile == "auto":
        trainer = dataclasses.replace(trainer, compile=saved["trainer"]["compile"])
    if trainer.pad_vocab == "auto":  # absent from the first configs of this format
        trainer = dataclasses.replace(trainer, pad_vocab=saved["trainer"].get("pad_vocab", False))
    if parallel.asked_threads is None:  # another number adds up in another order
        parallel = dataclasses.replace(parallel, num_threads=saved["parallel"]["num_threads"])
    device = saved["device"] if config.device == "auto" else config.device
    init_from, begun_from = config.init_from, saved.get("init_from")
    if init_from is not None and str(begun_from).startswith(f"{init_from.partition('@')[0]}:"):
        init_from = begun_from  # what was the newest version of a model when the run began
    return dataclasses.replace(
        config,
        device=device,
        model=model,
        precision=precision,
        parallel=parallel,
        trainer=trainer,
        init_from=init_from,
    )


def saved_model(saved_text: str) -> tuple[ModelConfig, int]:
    """The architecture, and the context in tokens, of the run of this `config.yaml`."""
    saved = load_yaml(saved_text)
    chosen: dict[str, str] = {}
    for entry in saved["defaults"]:
        chosen |= entry if isinstance(entry, dict) else {}
    schema = SCHEMAS["model"][chosen["override /model"]]
    return cast(ModelConfig, schema(**saved["model"])), int(saved["data"]["seq_len"])


def study_settings(config: ExperimentConfig) -> dict[str, str]:
    """The settings that all trials of a study share, by dotted key."""
    flat = flat_settings(load_yaml(to_yaml(config)))
    return {key: str(value) for key, value in flat.items() if not is_among(UNSEEN_IN_RESULTS, key)}


def resume_differences(saved_text: str, config: ExperimentConfig, free: Collection[str] = FREE_ON_RESUME) -> list[str]:
    """What a resumed run would do otherwise than the run of this `config.yaml`: `key old → new` of each that differs.

    The settings in `free`, `force` and those of tracking may.
    """
    old, new = (flat_settings(load_yaml(text)) for text in (saved_text, to_yaml(config)))
    keys = [key for key in {**old, **new} if not is_among(free, key)]
    return [f"{key} {old.get(key)} → {new.get(key)}" for key in keys if key != "force" and old.get(key) != new.get(key)]


def is_among(free: Collection[str], key: str) -> bool:
    """Whether a setting is one of those, or of tracking: a source in a mixture is as free as the data."""
    return re.sub(r"^data\.sources\.\w+\.", "data.", key) in free or key.startswith("tracking")


def _flat_values(prefix: str, content: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat_values(f"{prefix}{key}.", value) if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down: YAML has no tuples. A `${` in a text is escaped: it is no interpolation."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes every text that begins like a number: OmegaConf takes more of them for one than PyYAML does (1e3)."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if re.match(r"[-+.\d]", text) else None)


_Dumper.add_representer(str, _text)
