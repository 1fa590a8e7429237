"""A folder of transformers → a decoder of ours: what its `config.json` says, and its weights, one at a time.

Reads safetensors, in one file or in several with an index. Executes no pickle and needs no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lmtrain.errors import CheckpointError, ConfigError
from lmtrain.model.huggingface.choice import FORMATS
from lmtrain.model.huggingface.formats import Described, Format, Place
from lmtrain.model.huggingface.writing import CONFIG, WEIGHTS

INDEX = f"{WEIGHTS}.index.json"


@dataclass(frozen=True)
class StoredModel:
    """A model in a folder, opened by `open_model`."""

    folder: Path
    format: Format
    described: Described
    files: Mapping[str, Path]  # of each tensor, by name

    @cached_property
    def has_biases(self) -> bool:
        """Whether there are biases other than zero."""
        biases = [place for ours, place in self._places().items() if ours.endswith("bias") and self._has(place)]
        return any(bool(self._tensor(name).any()) for place in biases for name in place.names)

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Copy the weights into a model of the same architecture; a bias that is not here is zero.

        Raises CheckpointError if a weight is missing, has another shape or is of something else.
        """
        places = self._places()
        self._require_all_known(places)
        for name, parameter in model.named_parameters():
            place = places[name]
            if name.endswith("bias") and not self._has(place):
                parameter.zero_()
            else:
                parameter.copy_(self._read(place, parameter.shape))

    def _places(self) -> dict[str, Place]:
        """Where each weight is; a folder without the output matrix leaves out the prefix of all names."""
        format = self.format
        places = format.places(self.described.config)
        [embedding] = places["embedding.weight"].names
        if embedding in self.files:
            return places
        return {
            ours: Place(tuple(name.removeprefix(format.prefix) for name in place.names), place.rows, place.transposed)
            for ours, place in places.items()
        }

    def _has(self, place: Place) -> bool:
        return any(name in self.files for name in place.names)

    def _read(self, place: Place, shape: Sequence[int]) -> Tensor:
        """A weight of ours, in the number format of the file."""
        parts = [self._tensor(name) for name in place.names]
        for name, part, expected in zip(place.names, parts, place.shapes(shape), strict=True):
            if part.shape != expected:
                raise CheckpointError(
                    f"{self.folder} is damaged: {name} has the shape {list(part.shape)}, "
                    f"where its {CONFIG} says {list(expected)}"
                )
        return torch.cat([part.t() if place.transposed else part for part in parts])

    def _tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise CheckpointError(f"{self.folder} is damaged: there is no weight {name} in it")
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.files[name]} is damaged: {error}") from error
        return tensor

    def _require_all_known(self, places: Mapping[str, Place]) -> None:
        """A tensor that has no place here says that the model computes something else."""
        known = {name for place in places.values() for name in place.names}
        strange = [name for name in self.files if name not in known and not name.endswith(self.format.unused)]
        if "lm_head.weight" in strange and self.described.config.tie_embeddings:
            strange.remove("lm_head.weight")
            [embedding] = places["embedding.weight"].names
            if not torch.equal(self._tensor("lm_head.weight"), self._tensor(embedding)):
                raise CheckpointError(
                    f"{self.folder}: lm_head.weight is not the embedding, though {CONFIG} says tie_word_embeddings=true"
                )
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            raise CheckpointError(
                f"{self.folder} has weights that no {self.format.name} model here has: {', '.join(strange[:3])}{more}"
            )


def is_model_folder(folder: Path) -> bool:
    """Whether a folder looks like one of transformers."""
    return (folder / CONFIG).is_file()


def open_model(folder: Path) -> StoredModel:
    """Read what a folder says of its model, but no weights yet.

    Raises CheckpointError if it is damaged, of another format, or says what no decoder of ours does.
    """
    values = _read_json(folder / CONFIG)
    kinds = {format.model_type: format for format in FORMATS}
    kind = values.get("model_type")
    if kind not in kinds:
        raise CheckpointError(f"{folder} holds a model of type {kind}; {' and '.join(kinds)} are read here")
    if values.get("quantization_config"):
        raise CheckpointError(f"{folder} holds quantized weights, which are not read here")
    try:
        described = kinds[kind].parse(values)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (ArithmeticError, ConfigError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{folder / CONFIG} is damaged: {reason}") from error
    return StoredModel(folder, kinds[kind], described, _files(folder))


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or any(Path(str(file)).name != file for file in names.values()):
            raise CheckpointError(f"{folder / INDEX} is damaged: it does not say which file each weight is in")
        return {name: folder / file for name, file in names.items()}
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} (other files of weights are not read: they may hold code); "
            "write it with save_pretrained of transformers"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object")
    return content
