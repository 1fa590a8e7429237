"""The encoder-decoder against an independent implementation, and what padding, caches and training do to it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from naive_transformer import encoder_decoder_logits
from torch import Tensor

from lmtrain.config.schema import EncoderDecoderConfig
from lmtrain.model.building import build_model
from lmtrain.model.encoder_decoder import EncoderDecoder
from lmtrain.model.generation import generate_batch
from lmtrain.model.sampling import GREEDY
from lmtrain.training.activation_checkpointing import checkpoint_activations

VOCAB_SIZE, SEQ_LEN = 23, 12
SOURCE_LENGTHS = (7, 1, 4)


def built(dropout: float = 0.0, **settings: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    shape = {"d_model": 32, "num_encoder_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_ff": 48}
    config = EncoderDecoderConfig(**(shape | settings))
    model = build_model(config, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=dropout)
    assert isinstance(model, EncoderDecoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm.weight" in name else 0.0, std=0.3)
    return model


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


TARGETS, SOURCES = drawn(3, 9), drawn(3, max(SOURCE_LENGTHS), seed=2)
MASK = torch.arange(max(SOURCE_LENGTHS)) < torch.tensor(SOURCE_LENGTHS).unsqueeze(1)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "qk_norm": True, "activation": "relu2"},
    {"position": "learned", "norm": "layernorm", "bias": True, "activation": "gelu", "tie_embeddings": False},
    {"position": "sinusoidal", "num_kv_heads": 1, "logit_softcap": 5.0},
    {"position": "none", "rope_theta": 10.0},
]


@torch.no_grad()
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_logits_of_a_padded_batch_equal_the_reference_of_each_pair(settings: dict[str, Any]) -> None:
    model = built(**settings)
    logits_BTV = model(TARGETS, sources_BS=SOURCES, source_mask_BS=MASK)
    for row, length in enumerate(SOURCE_LENGTHS):
        expected_TV = encoder_decoder_logits(model.config, model.state_dict(), TARGETS[row], SOURCES[row, :length])
        error = (logits_BTV[row] - expected_TV).abs().max() / expected_TV.abs().max()
        assert error < 1e-5, f"row {row}: relative error {error}"


@torch.no_grad()
def test_what_stands_in_the_padding_is_never_read() -> None:
    model = built()
    logits_BTV = model(TARGETS, sources_BS=SOURCES, source_mask_BS=MASK)
    other = torch.where(MASK, SOURCES, (SOURCES + 5) % VOCAB_SIZE)
    assert torch.equal(model(TARGETS, sources_BS=other, source_mask_BS=MASK), logits_BTV)
    wider = torch.nn.functional.pad(SOURCES, (0, 5))
    mask = torch.nn.functional.pad(MASK, (0, 5))
    padded_BTV = model(TARGETS, sources_BS=wider, source_mask_BS=mask)
    torch.testing.assert_close(padded_BTV, logits_BTV, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_targets_see_their_past_and_the_whole_source() -> None:
    model = built()
    before_BTV = model(TARGETS, sources_BS=SOURCES)
    changed = TARGETS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB_SIZE
    after_BTV = model(changed, sources_BS=SOURCES)
    assert torch.equal(after_BTV[:, :4], before_BTV[:, :4])
    assert not torch.equal(after_BTV[:, 4], before_BTV[:, 4])
    for place in range(SOURCES.size(1)):
        changed = SOURCES.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCAB_SIZE
        assert (model(TARGETS, sources_BS=changed)[:, 0] - before_BTV[:, 0]).abs().amax() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_token_by_token_with_a_cache_equals_all_at_once(settings: dict[str, Any]) -> None:
    model = built(**settings)
    expected_BTV = model(TARGETS, sources_BS=SOURCES, source_mask_BS=MASK)
    cache = model.new_cache(3, memory=model.encode(SOURCES, MASK))
    parts = [model(TARGETS[:, :2], cache)]
    parts += [model(TARGETS[:, t : t + 1], cache) for t in range(2, TARGETS.size(1))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTV, atol=2e-5, rtol=1e-5)


def recomputed(model: EncoderDecoder, source: list[int], number: int) -> list[int]:
    tokens = [0]
    for _ in range(number):
        with torch.no_grad():
            logits_TV = model(torch.tensor([tokens[-SEQ_LEN:]]), sources_BS=torch.tensor([source]))[0]
        tokens.append(int(logits_TV[-1].argmax()))
    return tokens[1:]


def test_greedy_generation_equals_recomputation_for_sources_of_any_length() -> None:
    model = built(num_kv_heads=2).eval()
    sources = [row[:length].tolist() for row, length in zip(SOURCES, SOURCE_LENGTHS, strict=True)]
    prompts = [[0]] * 3
    found = generate_batch(model, prompts, GREEDY, max_new_tokens=SEQ_LEN, sources=sources)
    assert found == [recomputed(model, source, SEQ_LEN) for source in sources]


def test_a_source_longer_than_the_context_is_cut_as_in_training() -> None:
    model = built().eval()
    long = drawn(2 * SEQ_LEN).tolist()
    [found] = generate_batch(model, [[0]], GREEDY, max_new_tokens=4, sources=[long])
    assert found == recomputed(model, long[:SEQ_LEN], 4)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_reach_every_weight_and_survive_checkpointing(mode: Any) -> None:
    def gradients(model: EncoderDecoder) -> dict[str, Tensor | None]:
        torch.manual_seed(9)
        logits_BTV = model(TARGETS, sources_BS=SOURCES, source_mask_BS=MASK)
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), TARGETS.roll(-1, 1).flatten()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, saving = built(dropout=0.2), built(dropout=0.2)
    checkpoint_activations(saving.all_blocks(), mode)
    expected, ours = gradients(plain), gradients(saving)
    for name, gradient in expected.items():
        assert gradient is not None
        assert gradient.abs().sum() > 0, name
        assert torch.equal(torch.as_tensor(ours[name]), gradient), name


def test_compiled_in_one_graph_it_gives_the_same() -> None:
    model = built(num_kv_heads=2, qk_norm=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours = compiled(TARGETS, sources_BS=SOURCES, source_mask_BS=MASK)
    torch.testing.assert_close(ours, model(TARGETS, sources_BS=SOURCES, source_mask_BS=MASK), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32() -> None:
    torch.manual_seed(0)
    config = EncoderDecoderConfig(d_model=32, num_encoder_layers=2, num_decoder_layers=2, num_heads=4, qk_norm=True)
    model = build_model(config, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)
    exact_BTV = model(TARGETS, sources_BS=SOURCES, source_mask_BS=MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded_BTV = model(TARGETS, sources_BS=SOURCES, source_mask_BS=MASK)
    assert (rounded_BTV.float() - exact_BTV).abs().max() < 0.02 * exact_BTV.abs().max()


def test_overfits_pairs() -> None:
    """The first token of a target can only be known from its source."""
    torch.manual_seed(0)
    config = EncoderDecoderConfig(d_model=32, num_encoder_layers=1, num_decoder_layers=1, num_heads=2)
    model = build_model(config, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)
    sources, targets = drawn(8, 6, seed=3), drawn(8, 6, seed=4)
    inputs = torch.nn.functional.pad(targets[:, :-1], (1, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(120):
        logits_BTV = model(inputs, sources_BS=sources)
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    assert losses[-1] < 0.02


def test_initial_values_follow_the_depth_of_each_stack() -> None:
    torch.manual_seed(0)
    config = EncoderDecoderConfig(d_model=128, num_encoder_layers=2, num_decoder_layers=6, num_heads=4, bias=True)
    model = build_model(config, vocab_size=64, seq_len=16, dropout=0.0)
    weights = dict(model.named_parameters())
    for stack, writes in (("encoder_blocks", 2 * 2), ("blocks", 3 * 6)):
        for matrix in ("attention.output", "feed_forward.down"):
            std = weights[f"{stack}.0.{matrix}.weight"].std().item()
            assert std == pytest.approx(0.02 / writes**0.5, rel=0.05), matrix
    assert weights["blocks.3.cross_attention.key_value.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert all((weight == 0).all() for name, weight in weights.items() if name.endswith("bias"))


def test_block_matrices_are_those_of_both_stacks() -> None:
    model = built(position="learned", bias=True, tie_embeddings=False)
    chosen = {id(parameter) for parameter in model.block_matrices()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    assert len(names) == 2 * 4 + 3 * 7
    assert all("blocks" in name and name.endswith("weight") and "norm" not in name for name in names)
