"""Beam search against all continuations there are, against greedy decoding, and rows together against each alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from lmtrain.config.schema import DecoderConfig, EncoderDecoderConfig
from lmtrain.errors import ConfigError, RunError
from lmtrain.model.beam_search import beam_search
from lmtrain.model.building import Model, build_model
from lmtrain.model.generation import generate_batch
from lmtrain.model.sampling import GREEDY

VOCAB_SIZE, SEQ_LEN, STOP = 5, 12, 0
SOURCES = [[1, 2, 3, 4], [4], [2, 2, 1]]


def decoder(**settings: Any) -> Model:
    torch.manual_seed(3)
    config = DecoderConfig(**({"d_model": 16, "num_layers": 2, "num_heads": 2, "init_std": 0.6} | settings))
    return build_model(config, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0).eval()


def translator() -> Model:
    torch.manual_seed(5)
    config = EncoderDecoderConfig(d_model=16, num_encoder_layers=2, num_decoder_layers=2, num_heads=2, init_std=0.6)
    return build_model(config, vocab_size=VOCAB_SIZE, seq_len=SEQ_LEN, dropout=0.0).eval()


@torch.no_grad()
def log_probability(model: Model, prompt: list[int], tokens: list[int], source: list[int] | None) -> float:
    context = {} if source is None else {"sources_BS": torch.tensor([source])}
    logits = model(torch.tensor([[*prompt, *tokens][:-1]]), **context)[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens))


def best_of_all(
    model: Model, prompt: list[int], length: int, penalty: float, source: list[int] | None = None
) -> list[int]:
    """Every continuation that ends with the stop id, or is as long as allowed."""
    values = {}
    for size in range(1, length + 1):
        for tokens in itertools.product(range(VOCAB_SIZE), repeat=size):
            ended = tokens[-1] == STOP
            if STOP in tokens[:-1] or not (ended or size == length):
                continue
            value = log_probability(model, prompt, list(tokens), source) / size**penalty
            values[tokens[:-1] if ended else tokens] = max(value, values.get(tokens, -math.inf))
    return list(max(values, key=lambda tokens: values[tokens]))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_beams_enough_the_best_of_all_is_found(penalty: float) -> None:
    for model, prompt, source in [
        (decoder(), [1, 2], None),
        (decoder(num_kv_heads=1, sliding_window=2), [3], None),
        (translator(), [STOP], SOURCES[0]),
    ]:
        [found] = beam_search(
            model,
            [prompt],
            num_beams=VOCAB_SIZE**3,
            max_new_tokens=3,
            stop_ids=[STOP],
            length_penalty=penalty,
            sources=None if source is None else [source],
        )
        assert found == best_of_all(model, prompt, 3, penalty, source)


def test_one_beam_is_greedy() -> None:
    prompts = [[1, 2, 3], [4], [2, 2]]
    greedy = generate_batch(decoder(), prompts, GREEDY, max_new_tokens=8, stop_ids=[STOP])
    assert beam_search(decoder(), prompts, num_beams=1, max_new_tokens=8, stop_ids=[STOP]) == greedy
    starts = [[STOP]] * 3
    greedy = generate_batch(translator(), starts, GREEDY, max_new_tokens=8, stop_ids=[STOP], sources=SOURCES)
    found = beam_search(translator(), starts, num_beams=1, max_new_tokens=8, stop_ids=[STOP], sources=SOURCES)
    assert found == greedy


def test_more_beams_find_what_is_at_least_as_likely() -> None:
    model = decoder()
    values = []
    for num_beams in (1, 3, 40):
        [found] = beam_search(model, [[4, 1]], num_beams=num_beams, max_new_tokens=6, length_penalty=0.0)
        values.append(log_probability(model, [4, 1], found, None))
    assert values[0] <= values[1] + 1e-6 <= values[2] + 2e-6
    assert values[0] < values[2]  # else the test would show nothing


@pytest.mark.parametrize("num_beams", [1, 3])
def test_prompts_of_different_lengths_are_searched_as_alone(num_beams: int) -> None:
    settings: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": 6, "stop_ids": [STOP]}
    prompts = [[1, 2, 3, 4, 4], [4], [2, 2]]
    alone = [beam_search(decoder(), [prompt], **settings)[0] for prompt in prompts]
    assert beam_search(decoder(), prompts, **settings) == alone
    alone = [beam_search(translator(), [[STOP]], **settings, sources=[source])[0] for source in SOURCES]
    assert beam_search(translator(), [[STOP]] * 3, **settings, sources=SOURCES) == alone


def test_the_context_is_never_exceeded() -> None:
    long = [1, 2, 3, 4] * SEQ_LEN
    [found] = beam_search(decoder(), [long], num_beams=2, max_new_tokens=5)
    assert len(found) == 5
    assert found == beam_search(decoder(), [long[-(SEQ_LEN - 4) :]], num_beams=2, max_new_tokens=5)[0]
    assert len(beam_search(decoder(), [[1]], num_beams=2, max_new_tokens=99)[0]) == SEQ_LEN
    assert beam_search(decoder(), [[1]], num_beams=2, max_new_tokens=0) == [[]]


def test_a_search_leaves_the_model_as_it_was() -> None:
    model = decoder().train()
    beam_search(model, [[1]], num_beams=2, max_new_tokens=3)
    assert model.training


def test_wrong_requests_are_told() -> None:
    for wrong in (0, 1001):
        with pytest.raises(ConfigError, match=f"beams must lie between 1 and 1,000, got {wrong:,}"):
            beam_search(decoder(), [[1]], num_beams=wrong, max_new_tokens=3)
    with pytest.raises(ConfigError, match="at least one token"):
        beam_search(decoder(), [[]], num_beams=2, max_new_tokens=3)
    model = decoder()
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        beam_search(model, [[1]], num_beams=2, max_new_tokens=3)
