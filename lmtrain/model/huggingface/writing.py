"""A decoder → the files of a folder that transformers opens. The folder is there and the caller's to clean up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lmtrain.errors import ConfigError
from lmtrain.model.decoder import Decoder
from lmtrain.model.huggingface.formats import Described, Format, Place

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"


@torch.no_grad()
def write_model(
    folder: Path,
    model: Decoder,
    format: Format,
    *,
    dtype: torch.dtype,
    end_ids: Sequence[int],
    pad_id: int | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`.

    Args:
        format: one without obstacles for the model's settings.
        dtype: number format of the weights in the file.
        end_ids: tokens that end a text, that of documents first; pad_id: the token that fills rows up, if there is one.

    Raises ConfigError for a weight too large for `dtype`.
    """
    assert not format.obstacles(model.config)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for ours, place in format.places(model.config).items():
        if ours in parameters:
            weight = parameters[ours]
            _require_range(weight, dtype)
        elif format.always_biased:
            weight = torch.zeros(parameters[ours.removesuffix("bias") + "weight"].size(0))
        else:
            continue
        tensors |= {name: part.to("cpu", dtype) for name, part in _parts(weight, place)}
    described = Described(config=model.config, vocab_size=model.vocab_size, seq_len=model.seq_len)
    number_format = str(dtype).removeprefix("torch.")
    config = {
        "architectures": [format.architecture],
        "model_type": format.model_type,
        **format.describe(described),
        "bos_token_id": None,
        "eos_token_id": end_ids[0],
        "pad_token_id": pad_id,
        "dtype": number_format,
        "torch_dtype": number_format,  # what transformers 4 reads
    }
    generation = {
        "bos_token_id": None,
        "eos_token_id": list(end_ids) if len(end_ids) > 1 else end_ids[0],
        "pad_token_id": end_ids[0] if pad_id is None else pad_id,
    }
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION, generation)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # made with mode 0600, whatever the umask


def _parts(weight: Tensor, place: Place) -> Iterator[tuple[str, Tensor]]:
    """The tensors that stand for a weight."""
    parts = (weight,) if place.rows is None else torch.split(weight, list(place.rows))
    for name, part in zip(place.names, parts, strict=True):
        yield name, part.t().contiguous() if place.transposed else part


def _require_range(weight: Tensor, dtype: torch.dtype) -> None:
    largest = weight.abs().max().item()
    if largest > torch.finfo(dtype).max:
        raise ConfigError(
            f"a weight of {largest:g} does not fit into {str(dtype).removeprefix('torch.')}; take --dtype bf16 or fp32"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
