"""Every shipped preset has the size its file states: by formula and built on the meta device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lmtrain.config.presets import preset_of, sized_presets
from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig, TransformerConfig
from lmtrain.model.building import build_model
from lmtrain.model.sizing import count_parameters

OPTIONS = (Path(__file__).parents[1] / "conf" / "model").glob("*.yaml")
PRESETS = sorted(path for path in OPTIONS if path.stem != "auto")  # which is one of them
STATED = re.compile(
    r"^# parameters: ([\d,]+) at a vocabulary of ([\d,]+)(?: and data\.seq_len=([\d,]+))?$", re.MULTILINE
)
NOMINAL_SIZES = {
    **{"nano": 1e6, "tiny": 25e6, "small": 350e6, "medium": 1.5e9, "research": 7e9, "gpt2": 124e6},
    **{"seq2seq_nano": 1.9e6, "seq2seq_small": 61e6},
}
SCHEMAS = {"_decoder": DecoderConfig, "_encoder_decoder": EncoderDecoderConfig}
SEQ_LEN = 64  # where positions have no weights


def load(path: Path) -> tuple[TransformerConfig, int, int, int]:
    """The preset's config, the number of parameters it states, and the vocabulary and context it states it for."""
    text = path.read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    schema, own = values.pop("defaults")
    assert own == "_self_"
    stated = STATED.search(text)
    assert stated, f"{path.name} must state its size: # parameters: N at a vocabulary of V"
    parameters, vocab_size, seq_len = (number and int(number.replace(",", "")) for number in stated.groups())
    return SCHEMAS[schema](**values), parameters, vocab_size, seq_len or SEQ_LEN


def test_every_promised_preset_is_shipped() -> None:
    assert set(NOMINAL_SIZES) <= {path.stem for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_has_the_stated_size(path: Path) -> None:
    config, parameters, vocab_size, seq_len = load(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert count_parameters(config, vocab_size, seq_len).total == parameters
    with torch.device("meta"):
        model = build_model(config, vocab_size=vocab_size, seq_len=seq_len, dropout=0.0)
        tokens_BT = torch.zeros(1, seq_len, dtype=torch.int64)
        source = {"sources_BS": tokens_BT} if isinstance(config, EncoderDecoderConfig) else {}
        logits_BTV = model(tokens_BT, **source)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert logits_BTV.shape == (1, seq_len, vocab_size)
    if path.stem in NOMINAL_SIZES:
        assert parameters == pytest.approx(NOMINAL_SIZES[path.stem], rel=0.06)


def test_the_presets_that_auto_chooses_among_are_those_of_the_files_in_order() -> None:
    presets = sized_presets()
    assert list(presets) == ["nano", "tiny", "small", "medium", "research"]
    for name, preset in presets.items():
        assert preset == load(PRESETS[0].with_stem(name))[0]
        assert preset_of(preset) == name
    sizes = [count_parameters(preset, 32_000, SEQ_LEN).total for preset in presets.values()]
    assert sizes == sorted(sizes)
    assert preset_of(DecoderConfig(d_model=128, num_layers=5, num_heads=4)) is None
