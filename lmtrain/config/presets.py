"""The shapes that `model=auto` chooses among: shipped options of `model`, read as settings."""

from __future__ import annotations

import functools

from omegaconf import DictConfig, OmegaConf

from lmtrain.config.compose import config_dir
from lmtrain.config.schema import DecoderConfig, ModelConfig

SIZES = ("nano", "tiny", "small", "medium", "research")
"""From the smallest to the largest."""


@functools.cache
def sized_presets() -> dict[str, DecoderConfig]:
    """The presets of `SIZES`, by name."""
    presets = {}
    for name in SIZES:
        values = OmegaConf.load(config_dir() / "model" / f"{name}.yaml")
        assert isinstance(values, DictConfig)
        assert values.pop("defaults") == ["_decoder", "_self_"], f"model={name} builds on other options"
        preset = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DecoderConfig), values))
        assert isinstance(preset, DecoderConfig)
        presets[name] = preset
    return presets


def preset_of(model: ModelConfig) -> str | None:
    """The name of the preset of this shape, if it is one of `SIZES`."""
    return next((name for name, preset in sized_presets().items() if preset == model), None)
