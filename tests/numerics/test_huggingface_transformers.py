"""Models written here and opened by transformers, and the other way round: the same logits, the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import EXPORTABLE, GPT2, LLAMA, VOCAB_SIZE, random_decoder
from torch import Tensor

from lmtrain.model.decoder import Decoder
from lmtrain.model.generation import generate_batch
from lmtrain.model.huggingface.choice import nearest_format
from lmtrain.model.huggingface.reading import open_model
from lmtrain.model.huggingface.writing import write_model
from lmtrain.model.sampling import GREEDY

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
END_ID = VOCAB_SIZE - 1

SHAPES: dict[str, tuple[dict[str, Any], int]] = {name: (settings, 64) for name, settings in EXPORTABLE.items()} | {
    "far positions": ({**LLAMA, "d_model": 64}, 2048),
    "far positions, linear": ({**LLAMA, "rope_scaling": "linear", "rope_factor": 2.5}, 2048),
    "far positions, ntk": ({**LLAMA, "rope_scaling": "ntk", "rope_factor": 8.0}, 2048),
    "deep": ({**LLAMA, "num_layers": 12, "num_kv_heads": 2, "rope_theta": 500000.0}, 256),
    "wide heads": ({"d_model": 256, "num_layers": 2, "num_heads": 2}, 128),
    "deep gpt2": ({**GPT2, "num_layers": 12}, 256),
}


def export(model: Decoder, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers opens it."""
    folder.mkdir(exist_ok=True)
    write_model(folder, model, nearest_format(model.config), dtype=dtype, end_ids=[END_ID])
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@torch.inference_mode()
def logits(model: Any, tokens_BT: Tensor) -> Tensor:
    output = model(tokens_BT)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def random_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, END_ID, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_same(tmp_path: Path, name: str) -> None:
    settings, seq_len = SHAPES[name]
    model = random_decoder(settings, seq_len=seq_len)
    theirs, tokens_BT = export(model, tmp_path), random_tokens(2, seq_len)
    ours_BTV = logits(model, tokens_BT)
    assert ours_BTV.std() > 1  # the weights matter
    assert (ours_BTV - logits(theirs, tokens_BT)).abs().max() <= TOLERANCE
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for name, p in theirs.named_parameters() if model.config.bias or not name.endswith("bias")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_number_formats_are_ours_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    model, tokens_BT = random_decoder(LLAMA), random_tokens(2, 64)
    theirs = export(model, tmp_path, dtype)
    assert theirs.dtype == dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    assert (logits(model, tokens_BT) - logits(theirs.float(), tokens_BT)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", EXPORTABLE)
def test_greedy_text_is_the_same(tmp_path: Path, name: str) -> None:
    """Token for token, for prompts of several lengths, until the end token or the end of the context."""
    model = random_decoder(EXPORTABLE[name])
    theirs = export(model, tmp_path)
    prompts = [random_tokens(1, length)[0].tolist() for length in (1, 2, 7, 20)]
    ours = generate_batch(model, prompts, GREEDY, max_new_tokens=44, stop_ids={END_ID})
    for prompt, expected in zip(prompts, ours, strict=True):
        [found] = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=44)
        found_ids = found[len(prompt) :].tolist()
        assert [token for token in found_ids if token != END_ID] == list(expected)
    assert len({token for text in ours for token in text}) > 5


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    """In shards with an index, or in one file; written again it is the same."""
    shapes = {"vocab_size": VOCAB_SIZE, "eos_token_id": END_ID, "bos_token_id": None}
    llama = transformers.LlamaConfig(
        **shapes,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        attention_bias=True,
        mlp_bias=True,
    )
    gpt2 = transformers.GPT2Config(**shapes, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    tokens_BT = random_tokens(2, 64)
    for config in (llama, gpt2):
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for name, size in (("shards", "40KB"), ("whole", "5GB")):
            folder = tmp_path / config.model_type / name
            theirs.save_pretrained(folder, max_shard_size=size)
            assert (folder / "model.safetensors.index.json").exists() == (name == "shards")
            stored = open_model(folder)
            assert stored.has_biases
            settings = {**vars(stored.described.config), "bias": True}
            ours = random_decoder(settings)
            stored.load_into(ours)
            assert (logits(ours, tokens_BT) - logits(theirs, tokens_BT)).abs().max() <= TOLERANCE
            again = export(ours, tmp_path / config.model_type / f"{name} again")
            for (key, weight), (other, expected) in zip(
                again.named_parameters(), theirs.named_parameters(), strict=True
            ):
                assert key == other
                assert torch.equal(weight, expected)


def test_a_folder_of_the_bare_model_is_read(tmp_path: Path) -> None:
    """Saved without the output matrix: names have no prefix."""
    theirs = export(random_decoder(GPT2), tmp_path / "whole")
    theirs.transformer.save_pretrained(tmp_path / "bare")
    ours, expected = random_decoder({**GPT2, "init_std": 0.1}), random_decoder(GPT2)
    with torch.no_grad():
        ours.embedding.weight.zero_()
    open_model(tmp_path / "bare").load_into(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))
