"""A trained model as an MLflow model: the folder that MLflow opens and serves over HTTP, and how a request is answered.

Owns the signature: a column of prompts and the settings of `lmtrain generate` in, a column of texts out. What MLflow
runs of such a folder is `served_model.py`. MLflow is imported where a folder is written.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lmtrain.config.schema.rules import require
from lmtrain.data.records import ROLES, Message, Role
from lmtrain.data.tokenizer import Tokenizer, load_tokenizer
from lmtrain.errors import RunError, RunFolderError
from lmtrain.inference.chat import encode_turns, knows_roles
from lmtrain.inference.export import Exported
from lmtrain.inference.settings import GenerationSettings, continue_prompts, fit_prompts
from lmtrain.inference.trained import TrainedModel
from lmtrain.new_folder import appearing_whole, require_free
from lmtrain.redaction import redact
from lmtrain.run_dir import RunDir
from lmtrain.tracking.background import one_line

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.types import TensorSpec
    from torch import Tensor

RUN = "run"
"""The artifact of an MLflow model that is a run folder, with weights only."""

DEVICE = "device"
"""What `model_config` of an MLflow model may change."""

PROMPT, MESSAGES, TEXT = "prompt", "messages", "text"  # columns
EXAMPLE_LENGTH = 40  # characters

_ENVIRONMENT = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
"""Of MLflow, unless the user set it."""

_PARAM_TYPES = {"float": "double", "int": "long", "bool": "boolean"}
"""Annotation → type in MLflow."""

log = logging.getLogger(__name__)


def save_mlflow_model(run: Path, to: Path, *, checkpoint: str | None = None) -> Exported:
    """Write the model of a run folder as an MLflow model, which needs neither the run nor any pickle.

    `to/artifacts/run` is a run folder of its own with all that generating takes: `load_model` opens it too.

    Args:
        to: new, or empty; parents are made.
        checkpoint: as for `load_model`.

    Raises:
        UsageError: there is no such run or checkpoint, or no room at `to`; nothing is written.
        RunError: the disk is full; nothing is left of the folder.
    """
    to = to.expanduser().resolve()
    require_free(to)
    source = RunDir(run)
    if not source.is_run():
        raise RunFolderError(f"there is no run folder {source} (it would hold config.yaml)")
    from lmtrain.training.chosen_checkpoint import load_chosen

    saved, tokenizer = load_chosen(source, checkpoint, weights_only=True), load_tokenizer(source.tokenizer)
    step = saved.meta["progress"]["step"]
    with appearing_whole(to) as draft, tempfile.TemporaryDirectory() as apart:
        slim = RunDir(Path(apart) / RUN)
        _copy(source, slim, saved.model, tokenizer, step)
        _save(slim, draft, chat=knows_roles(tokenizer))
    num_parameters = sum(weights.numel() for weights in saved.model.values())
    return Exported(format="MLflow", step=step, num_parameters=num_parameters)


def write_mlflow_model(run: Path, to: Path) -> None:
    """Write a run folder as it is, with all it holds, as an MLflow model into a new folder. Raises RunError."""
    with tempfile.TemporaryDirectory() as apart:
        named = RunDir(Path(apart) / RUN)  # MLflow keeps the folder's name, and follows no link
        shutil.copytree(run, named.path)
        _save(named, to, chat=knows_roles(load_tokenizer(named.tokenizer)))


def _copy(run: RunDir, to: RunDir, weights: dict[str, Tensor], tokenizer: Tokenizer, step: int) -> None:
    """Write what `load_model` needs of a run."""
    from lmtrain.training.checkpoint import Checkpoint, CheckpointFolder

    to.write_texts({to.config.name: redact(run.config.read_text(encoding="utf-8"))})
    tokenizer.save(to.tokenizer)
    if run.sample.exists():
        to.write_texts({to.sample.name: run.sample.read_text(encoding="utf-8")})
    checkpoint = Checkpoint(model=weights, state={}, meta={"progress": {"step": step}})
    CheckpointFolder(to.checkpoints).write(checkpoint, step=step)


def _save(run: RunDir, to: Path, *, chat: bool) -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow
    import pandas as pd
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        mlflow.pyfunc.save_model(
            to,
            python_model=Path(__file__).with_name("served_model.py"),
            artifacts={RUN: str(run.path)},
            model_config={DEVICE: "auto"},
            signature=_signature(chat=chat),
            input_example=(pd.DataFrame({PROMPT: [_example(run)]}), {"max_new_tokens": 50}),
            pip_requirements=_requirements(),
        )
    except (shutil.Error, MlflowException) as error:  # of files that it copies
        what = error.args[0][0][2] if isinstance(error, shutil.Error) else one_line(error)
        raise RunError(f"MLflow cannot write the model: {what}") from error


def _signature(*, chat: bool) -> ModelSignature:
    """What MLflow checks of a request, and fills in, before it comes here."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    # Only where a single column is required does MLflow take {"inputs": ["a", "b"]} for its values.
    columns: list[ColSpec | TensorSpec] = [ColSpec("string", PROMPT, required=not chat)]
    if chat:
        message = Object([Property("role", "string"), Property("content", "string")])
        columns.append(ColSpec(Array(message), MESSAGES, required=False))
    params = [ParamSpec("stop", "string", [], shape=(-1,))]
    for field in fields(GenerationSettings):
        if field.name != "stop":
            kind = str(field.type).removesuffix(" | None")
            params.append(ParamSpec(field.name, _PARAM_TYPES[kind], field.default))
    return ModelSignature(Schema(columns), Schema([ColSpec("string", TEXT)]), ParamSchema(params))


def _example(run: RunDir) -> str:
    """A prompt in words that the tokenizer knows: how the run's sample begins. Empty for a run without one."""
    sample = run.sample.read_text(encoding="utf-8") if run.sample.exists() else ""
    return sample.strip().partition("\n")[0][:EXAMPLE_LENGTH]


def _requirements() -> list[str]:
    """The versions at hand, without what names a build (`+cpu`). MLflow would find them by opening the model."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in ("lmtrain", "torch")]


# ------------------------------------------------------------------------------------------- requests


def answer(trained: TrainedModel, rows: Sequence[Mapping[Hashable, Any]], params: Mapping[str, Any]) -> list[str]:
    """The texts that follow the prompts of a request: those that `lmtrain generate` makes with the same settings.

    Args:
        rows: with a `prompt` each, or with `messages`. MLflow makes one row of `{"prompt": ["a", "b"]}`: it holds two.
        params: fields of `GenerationSettings`.

    Raises:
        UsageError: there is no prompt, one is no text or (strict) too long, or a setting is out of range.
        RunError: the model's weights are of no use.
    """
    for field in fields(GenerationSettings):
        given = params.get(field.name, field.default) is not None or "None" in str(field.type)
        require(given, f"{field.name} must not be null: leave it out to have its default")
    settings = GenerationSettings(**params)
    prompts = [prompt_ids for row in rows for prompt_ids in _encode(trained, row)]
    require(len(prompts) > 0, f"the request holds no {PROMPT}")
    for notice in fit_prompts(trained, prompts, settings):
        log.warning(notice)
    return continue_prompts(trained, prompts, settings)


def _encode(trained: TrainedModel, row: Mapping[Hashable, Any]) -> list[list[int]]:
    """The prompts of a row."""
    if MESSAGES in row:
        require(bool(row[MESSAGES]), f"{MESSAGES} must hold at least one message")
        return [encode_turns(trained.tokenizer, [_message(message) for message in row[MESSAGES]])]
    prompts = row[PROMPT] if isinstance(row[PROMPT], list) else [row[PROMPT]]
    for prompt in prompts:
        require(isinstance(prompt, str), f"a prompt must be a text, got {prompt!r}")
    return [trained.encode_prompt(str(prompt)) for prompt in prompts]  # NumPy has a str of its own


def _message(message: Mapping[str, str]) -> Message:
    role = message["role"]
    require(role in ROLES, f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
    return Message(cast(Role, role), message["content"])
