"""Every shipped decoder preset has the size its file states: by formula and built on the meta device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lmtrain.config.schema import DecoderConfig
from lmtrain.model.building import build_model
from lmtrain.model.sizing import count_parameters

PRESETS = sorted((Path(__file__).parents[1] / "conf" / "model").glob("*.yaml"))
STATED = re.compile(r"^# parameters: ([\d,]+) at a vocabulary of ([\d,]+)$", re.MULTILINE)
NOMINAL_SIZES = {"nano": 1e6, "tiny": 25e6, "small": 350e6, "medium": 1.5e9, "research": 7e9}
SEQ_LEN = 64


def load(path: Path) -> tuple[DecoderConfig, int, int]:
    """The preset's config, the number of parameters it states and the vocabulary it states it for."""
    text = path.read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    assert values.pop("defaults") == ["_decoder", "_self_"]
    stated = STATED.search(text)
    assert stated, f"{path.name} must state its size: # parameters: N at a vocabulary of V"
    parameters, vocab_size = (int(number.replace(",", "")) for number in stated.groups())
    return DecoderConfig(**values), parameters, vocab_size


def test_every_promised_preset_is_shipped() -> None:
    assert set(NOMINAL_SIZES) <= {path.stem for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_has_the_stated_size(path: Path) -> None:
    config, parameters, vocab_size = load(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert count_parameters(config, vocab_size, SEQ_LEN).total == parameters
    with torch.device("meta"):
        model = build_model(config, vocab_size=vocab_size, seq_len=SEQ_LEN, dropout=0.0)
        logits_BTV = model(torch.zeros(1, SEQ_LEN, dtype=torch.int64))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert logits_BTV.shape == (1, SEQ_LEN, vocab_size)
    if path.stem in NOMINAL_SIZES:
        assert parameters == pytest.approx(NOMINAL_SIZES[path.stem], rel=0.06)
