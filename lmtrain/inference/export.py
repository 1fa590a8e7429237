"""A run's model as a folder of Hugging Face's transformers: all of it, or nothing.

What the formats say is `model/huggingface`'s, the tokenizer's files are `data/tokenizer`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import DecoderConfig, ExperimentConfig
from lmtrain.data.tokenizer import PAD, TURN_END, huggingface_files, load_tokenizer
from lmtrain.errors import ConfigError, UsageError
from lmtrain.inference.trained import load_model
from lmtrain.model.huggingface.choice import FORMATS, nearest_format
from lmtrain.model.huggingface.formats import Format
from lmtrain.new_folder import appearing_whole, require_free
from lmtrain.run_dir import OWN_TOKENIZER, RunDir

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Our word → PyTorch's."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    format: str  # Llama, GPT-2 or MLflow
    step: int  # of the checkpoint
    num_parameters: int


def export_run(run: Path, folder: Path, *, checkpoint: str | None = None, dtype: str = "fp32") -> Exported:
    """Write the model of a run folder in the Llama or the GPT-2 format, with its tokenizer.

    Args:
        folder: new, or empty; parents are made.
        checkpoint: as for `load_model`; dtype: of DTYPES.

    Raises:
        UsageError: there is no such run, checkpoint or room, or the formats cannot hold the model; nothing is written.
        RunError: the disk is full; nothing is left of the folder.
    """
    folder = folder.expanduser().resolve()
    require_free(folder)
    format, files = _require_exportable(compose_config([], run), RunDir(run))
    trained = load_model(run, checkpoint=checkpoint, device="cpu")
    import torch

    from lmtrain.model.decoder import Decoder
    from lmtrain.model.huggingface.writing import write_model

    assert isinstance(trained.model, Decoder)
    tokenizer = trained.tokenizer
    ends = dict.fromkeys([tokenizer.end_id, tokenizer.special.get(TURN_END, tokenizer.end_id)])
    with appearing_whole(folder) as draft:
        write_model(
            draft,
            trained.model,
            format,
            dtype=getattr(torch, DTYPES[dtype]),
            end_ids=list(ends),
            pad_id=tokenizer.special.get(PAD),
        )
        for name, content in {**files, OWN_TOKENIZER: tokenizer.serialize()}.items():
            (draft / name).write_bytes(content)
    return Exported(format=format.name, step=trained.step, num_parameters=trained.num_parameters)


def _require_exportable(config: ExperimentConfig, run: RunDir) -> tuple[Format, Mapping[str, bytes]]:
    """The format for a run's model and the files of its tokenizer. Raises ConfigError with everything against it."""
    format, reasons, remedy = FORMATS[0], list[str](), ""
    if isinstance(config.model, DecoderConfig):
        format = nearest_format(config.model)
        if instead := format.obstacles(config.model):
            wrong = ", no ".join(f"model.{name}={_word(getattr(config.model, name))}" for name in instead)
            reasons.append(f"the {format.name} format has no {wrong}")
            words = " ".join(f"model.{name}={_word(value)}" for name, value in instead.items())
            remedy = f"\nto export a run, train it with {words}"
    else:
        reasons.append("it is an encoder–decoder, and the Llama and GPT-2 formats hold decoders")
    files: Mapping[str, bytes] = {}
    try:
        files = huggingface_files(load_tokenizer(run.tokenizer), model_max_length=config.data.seq_len)
    except UsageError as error:
        reasons.append(str(error))
    if reasons:
        raise ConfigError(f"{run} cannot be exported: {'; '.join(reasons)}{remedy}")
    return format, files


def _word(value: object) -> str:
    """As typed on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
