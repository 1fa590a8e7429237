"""Which format a decoder is written in, and which one a folder is in."""

from __future__ import annotations

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.huggingface.formats import Format
from lmtrain.model.huggingface.gpt2 import Gpt2
from lmtrain.model.huggingface.llama import Llama

FORMATS: tuple[Format, ...] = (Llama(), Gpt2())


def nearest_format(config: DecoderConfig) -> Format:
    """The format that holds a decoder, or else the one that has no room for the fewest of its settings."""
    return min(FORMATS, key=lambda format: len(format.obstacles(config)))
