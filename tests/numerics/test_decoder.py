"""The decoder against an independent implementation that shares none of the model's code, and its habits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from naive_transformer import decoder_logits
from torch import Tensor

from lmtrain.config.schema import DecoderConfig, ModelConfig
from lmtrain.model.building import build_model
from lmtrain.model.decoder import Decoder

VOCAB_SIZE, SEQ_LEN = 23, 12


def decoder_config(**settings: Any) -> DecoderConfig:
    shape = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48}
    return DecoderConfig(**(shape | settings))


def decoder(dropout: float = 0.0, **settings: Any) -> Decoder:
    return build_model(decoder_config(**settings), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=dropout)


def randomise(model: Decoder) -> None:
    """Weights large enough that a slip in any of them shows in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)


def tokens(batch_size: int = 3, length: int = SEQ_LEN) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(1))


def reference_logits(model: Decoder, tokens_T: Tensor) -> Tensor:
    return decoder_logits(model.config, model.state_dict(), tokens_T)


CHOICES: dict[str, tuple[Any, ...]] = {
    "norm": ("rmsnorm", "layernorm"),
    "position": ("rotary", "learned", "sinusoidal", "none"),
    "activation": ("swiglu", "geglu", "gelu", "gelu_tanh", "relu2"),
    "num_kv_heads": (None, 2, 1),
    "qk_norm": (False, True),
    "tie_embeddings": (True, False),
}


@pytest.mark.parametrize(("norm", "position"), itertools.product(CHOICES["norm"], CHOICES["position"]))
def test_logits_equal_the_reference_for_every_choice(norm: str, position: str) -> None:
    torch.manual_seed(0)
    others = {name: values for name, values in CHOICES.items() if name not in ("norm", "position")}
    for values in itertools.product(*others.values()):
        settings = dict(zip(others, values, strict=True))
        model = decoder(norm=norm, position=position, **settings)
        randomise(model)
        sequence_T = tokens(batch_size=1, length=5)[0]
        with torch.no_grad():
            logits_TV = model(sequence_T[None])[0]
            expected_TV = reference_logits(model, sequence_T)
        assert_near(logits_TV, expected_TV, settings)


def assert_near(logits_TV: Tensor, expected_TV: Tensor, settings: Any) -> None:
    """fp32 against float64; relative to the largest logit, which depends on the settings."""
    error = (logits_TV - expected_TV).abs().max() / expected_TV.abs().max()
    assert error < 1e-5, f"{settings}: relative error {error}"


FURTHER: list[dict[str, Any]] = [
    {"bias": True},
    {"bias": True, "norm": "layernorm", "position": "learned", "activation": "gelu_tanh"},
    {"sliding_window": 3},
    {"sliding_window": 1, "num_kv_heads": 2},
    {"sliding_window": SEQ_LEN},
    {"logit_softcap": 2.0},
    {"rope_scaling": "linear", "rope_factor": 4.0},
    {"rope_scaling": "ntk", "rope_factor": 4.0},
    {"rope_theta": 100.0, "rope_scaling": "ntk", "rope_factor": 1.5, "sliding_window": 5, "logit_softcap": 8.0},
]


@torch.no_grad()
@pytest.mark.parametrize("settings", FURTHER, ids=str)
def test_logits_equal_the_reference_with_further_settings(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = decoder(**settings)
    randomise(model)
    sequence_T = tokens(batch_size=1)[0]
    expected_TV = reference_logits(model, sequence_T)
    assert_near(model(sequence_T[None])[0], expected_TV, settings)
    if "bias" not in settings and settings.get("sliding_window") != SEQ_LEN:
        plain = decoder(num_kv_heads=settings.get("num_kv_heads"))
        plain.load_state_dict(model.state_dict())
        assert (plain(sequence_T[None])[0] - expected_TV).abs().max() > 1e-2, "it makes a difference"


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, *FURTHER], ids=str)
def test_token_by_token_with_a_cache_equals_all_at_once(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = decoder(**settings).eval()
    randomise(model)
    tokens_BT, cache = tokens(), model.new_cache(3)
    parts = [model(tokens_BT[:, :4], cache)]
    parts += [model(tokens_BT[:, t : t + 1], cache) for t in range(4, SEQ_LEN)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens_BT), atol=2e-5, rtol=1e-5)


def test_reference_notices_a_wrong_setting() -> None:
    """The comparison above has teeth: each setting alone changes the logits."""
    torch.manual_seed(0)
    model = decoder(num_kv_heads=2, qk_norm=True)
    randomise(model)
    sequence_T = tokens(batch_size=1)[0]
    right_TV = reference_logits(model, sequence_T)
    for wrong in ({"norm": "layernorm"}, {"qk_norm": False}, {"rope_theta": 100.0}, {"activation": "geglu"}):
        model.config = decoder_config(**({"num_kv_heads": 2, "qk_norm": True} | wrong))
        assert (reference_logits(model, sequence_T) - right_TV).abs().max() > 1e-2, wrong


@pytest.mark.parametrize("position", CHOICES["position"])
@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_a_token_never_changes_logits_before_it(position: str, num_kv_heads: int | None) -> None:
    torch.manual_seed(0)
    model = decoder(position=position, num_kv_heads=num_kv_heads)
    randomise(model)
    tokens_BT = tokens()
    with torch.no_grad():
        before_BTV = model(tokens_BT)
        for t in range(SEQ_LEN):
            changed_BT = tokens_BT.clone()
            changed_BT[:, t] = (changed_BT[:, t] + 1) % VOCAB_SIZE
            after_BTV = model(changed_BT)
            assert torch.equal(after_BTV[:, :t], before_BTV[:, :t])
            assert not torch.equal(after_BTV[:, t], before_BTV[:, t])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "layernorm", "position": "learned", "activation": "gelu", "tie_embeddings": False},
        {"activation": "relu2", "qk_norm": True, "output_init": "zero", "num_kv_heads": 2},
    ],
    ids=["llama", "gpt", "nano"],
)
def test_overfits_one_batch(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = decoder(**settings)
    tokens_BT = torch.randint(VOCAB_SIZE, (4, SEQ_LEN + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(150):
        logits_BTV = model(tokens_BT[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    # What is left is the first tokens, which no context tells apart.
    assert losses[-1] < 0.05


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    model = decoder(dropout=0.2)
    without = decoder(dropout=0.0)
    without.load_state_dict(model.state_dict())
    tokens_BT = tokens()
    assert torch.equal(model.eval()(tokens_BT), without.train()(tokens_BT))

    model.train()
    torch.manual_seed(7)
    first_BTV, other_BTV = model(tokens_BT), model(tokens_BT)
    torch.manual_seed(7)
    assert torch.equal(model(tokens_BT), first_BTV)
    assert not torch.equal(other_BTV, first_BTV)


def test_dropout_acts_on_embedding_attention_and_both_sublayers() -> None:
    torch.manual_seed(0)
    model = decoder(dropout=0.5)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {"dropout": 0.5, "blocks.0.dropout": 0.5, "blocks.1.dropout": 0.5}
    attention = model.blocks[0].attention
    x_BTD = torch.randn(1, SEQ_LEN, 32)
    assert not torch.equal(attention(x_BTD), attention(x_BTD))
    attention.eval()
    assert torch.equal(attention(x_BTD), attention(x_BTD))


def test_context_longer_than_seq_len_is_refused() -> None:
    with pytest.raises(AssertionError, match="seq_len"):
        decoder()(torch.zeros(1, SEQ_LEN + 1, dtype=torch.int64))


def test_saved_state_holds_weights_only_and_each_once() -> None:
    tied = decoder().state_dict()
    assert "head.weight" not in tied
    assert not any("rotary" in name for name in tied)
    assert "head.weight" in decoder(tie_embeddings=False).state_dict()
    assert len({value.data_ptr() for value in tied.values()}) == len(tied)


def test_block_matrices_are_all_matrices_inside_the_blocks() -> None:
    model = decoder(position="learned", tie_embeddings=False)
    chosen = {id(parameter) for parameter in model.block_matrices()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    matrices = ("attention.qkv", "attention.output", "feed_forward.up", "feed_forward.down")
    assert names == [f"blocks.{i}.{matrix}.weight" for i in range(2) for matrix in matrices]


def test_same_seed_builds_the_same_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(decoder().state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_bf16_autocast_stays_near_fp32() -> None:
    torch.manual_seed(0)
    model = decoder(qk_norm=True, num_kv_heads=2)
    tokens_BT = tokens()
    with torch.no_grad():
        exact_BTV = model(tokens_BT)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded_BTV = model(tokens_BT)
    assert (rounded_BTV.float() - exact_BTV).abs().max() < 0.02 * exact_BTV.abs().max()


def test_a_config_of_another_architecture_is_refused() -> None:
    with pytest.raises(TypeError, match="ModelConfig"):
        build_model(ModelConfig(), vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0)
