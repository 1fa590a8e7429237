"""Generation with the cache against recomputation, sampling against its probabilities, and manners."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmtrain.config.schema import DecoderConfig
from lmtrain.errors import UsageError
from lmtrain.model.decoder import Decoder, build_model
from lmtrain.model.generation import choose_token, generate

VOCAB_SIZE, SEQ_LEN = 50, 16


def decoder(seq_len: int = SEQ_LEN, dropout: float = 0.0, **settings: Any) -> Decoder:
    torch.manual_seed(3)  # a model whose greedy text varies
    config = DecoderConfig(
        **({"d_model": 32, "num_layers": 2, "num_heads": 4, "init_std": 0.3, "tie_embeddings": False} | settings)
    )
    return build_model(config, vocab_size=VOCAB_SIZE, seq_len=seq_len, dropout=dropout)


def recomputed(model: Decoder, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """Greedy generation without a cache: the whole context each time, cut by the same rule when full."""
    context, new_ids = prompt_ids[-model.seq_len :], []
    for _ in range(max_new_tokens):
        if len(context) > model.seq_len:
            context = context[-max(1, model.seq_len // 2) :]
        with torch.no_grad():
            token = int(model(torch.tensor([context]))[0, -1].argmax())
        context = [*context, token]
        new_ids.append(token)
    return new_ids


@pytest.mark.parametrize("prompt_length", [1, 7, SEQ_LEN, 3 * SEQ_LEN])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"position": "learned", "norm": "layernorm", "activation": "gelu"},
        {"num_kv_heads": 1, "qk_norm": True},
    ],
    ids=["rotary", "learned", "mqa"],
)
def test_greedy_with_cache_equals_recomputation(settings: dict[str, Any], prompt_length: int) -> None:
    model = decoder(**settings)
    prompt_ids = torch.randint(VOCAB_SIZE, (prompt_length,)).tolist()
    new_ids = generate(model, prompt_ids, max_new_tokens=3 * SEQ_LEN, temperature=0)
    assert new_ids == recomputed(model, prompt_ids, 3 * SEQ_LEN)
    assert len(set(new_ids)) > 3  # not one token for ever, which would compare nothing


def test_a_context_of_one_token_works() -> None:
    model = decoder(seq_len=1)
    assert generate(model, [3], max_new_tokens=5, temperature=0) == recomputed(model, [3], 5)


def test_seed_decides_the_text_and_the_global_state_is_left_alone() -> None:
    model = decoder()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(model, [1, 2], max_new_tokens=20, temperature=1.0, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert generate(model, [1, 2], max_new_tokens=20, temperature=1.0, seed=5) == first
    assert generate(model, [1, 2], max_new_tokens=20, temperature=1.0, seed=6) != first


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_dropout_is_off(training: bool) -> None:
    model = decoder(dropout=0.5).train(training)
    new_ids = generate(model, [1, 2, 3], max_new_tokens=8, temperature=0)
    assert model.training is training
    assert new_ids == recomputed(model.eval(), [1, 2, 3], 8)


def test_the_prompt_is_not_changed_and_no_tokens_can_be_asked_for() -> None:
    prompt_ids = [1, 2, 3]
    assert generate(decoder(), prompt_ids, max_new_tokens=0) == []
    generate(decoder(), prompt_ids, max_new_tokens=4)
    assert prompt_ids == [1, 2, 3]


def test_stop_id_ends_the_text_and_is_not_part_of_it() -> None:
    model = decoder()
    whole = generate(model, [1], max_new_tokens=20, temperature=0)
    stop_id = whole[6]
    stopped = generate(model, [1], max_new_tokens=20, temperature=0, stop_id=stop_id)
    assert stopped == whole[: whole.index(stop_id)]


def test_tokens_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)

    def frequencies(temperature: float, top_k: int | None) -> torch.Tensor:
        draws = [choose_token(probabilities.log(), temperature, top_k, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(draws), minlength=4) / len(draws)

    def close(drawn: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool(torch.all((drawn - expected).abs() < 4 * (0.25 / 4000) ** 0.5))  # four standard errors

    assert close(frequencies(1.0, None), probabilities)
    assert close(frequencies(1.0, 99), probabilities)
    assert close(frequencies(0.5, None), probabilities**2 / (probabilities**2).sum())
    assert close(frequencies(1.0, 2), torch.tensor([0.625, 0.375, 0.0, 0.0]))
    assert frequencies(1.0, 2)[2:].sum() == 0


def test_a_very_low_temperature_is_greedy_and_finite() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0])
    assert choose_token(logits_V, 1e-6, None, torch.Generator()) == 1
    assert choose_token(logits_V, 0, None, torch.Generator()) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt_ids": []}, "prompt"),
        ({"prompt_ids": [1], "temperature": -0.5}, "temperature .* -0.5"),
        ({"prompt_ids": [1], "top_k": 0}, "top_k .* 0"),
    ],
)
def test_an_impossible_request_is_refused(request_: dict[str, Any], message: str) -> None:
    model = decoder().train()
    with pytest.raises(UsageError, match=message):
        generate(model, max_new_tokens=3, **request_)
    assert model.training
