"""Generation with the cache against recomputation, batches against each text alone, and manners."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmtrain.config.schema import DecoderConfig
from lmtrain.errors import UsageError
from lmtrain.model.building import build_model
from lmtrain.model.decoder import Decoder
from lmtrain.model.generation import generate, generate_batch
from lmtrain.model.sampling import GREEDY, Sampling

VOCAB_SIZE, SEQ_LEN = 50, 16

SHAPES: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned": {"position": "learned", "norm": "layernorm", "activation": "gelu"},
    "mqa": {"num_kv_heads": 1, "qk_norm": True},
    "gqa": {"num_kv_heads": 2, "position": "learned"},
}


def decoder(seq_len: int = SEQ_LEN, dropout: float = 0.0, **settings: Any) -> Decoder:
    torch.manual_seed(3)  # a model whose greedy text varies
    config = DecoderConfig(
        **({"d_model": 32, "num_layers": 2, "num_heads": 4, "init_std": 0.3, "tie_embeddings": False} | settings)
    )
    return build_model(config, vocab_size=VOCAB_SIZE, seq_len=seq_len, dropout=dropout)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def recomputed(model: Decoder, prompt_ids: list[int], max_new_tokens: int, penalty: float = 1.0) -> list[int]:
    """Greedy generation without a cache: the whole context each time, cut by the same rule when full."""
    context, new_ids = prompt_ids[-model.seq_len :], []
    seen = set(context)
    for _ in range(max_new_tokens):
        if len(context) > model.seq_len:
            context = context[-max(1, model.seq_len // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0, -1].tolist()
        for token in seen:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        token = max(range(VOCAB_SIZE), key=logits.__getitem__)
        context = [*context, token]
        seen.add(token)
        new_ids.append(token)
    return new_ids


# ---------------------------------------------------------------------------------------- one text


@pytest.mark.parametrize("prompt_length", [1, 7, SEQ_LEN, 3 * SEQ_LEN])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_with_cache_equals_recomputation(shape: str, prompt_length: int) -> None:
    model = decoder(**SHAPES[shape])
    [prompt_ids] = prompts_of(prompt_length)
    new_ids = generate(model, prompt_ids, GREEDY, max_new_tokens=3 * SEQ_LEN)
    assert new_ids == recomputed(model, prompt_ids, 3 * SEQ_LEN)
    assert len(set(new_ids)) > 3  # not one token for ever, which would compare nothing


@pytest.mark.parametrize("seq_len", [1, 2, 3])
def test_a_context_of_hardly_any_tokens_works(seq_len: int) -> None:
    model = decoder(seq_len=seq_len)
    assert generate(model, [3], GREEDY, max_new_tokens=9) == recomputed(model, [3], 9)


def test_a_sample_recorded_with_an_earlier_version_comes_again() -> None:
    new_ids = generate(decoder(num_kv_heads=2), [1, 2, 3], max_new_tokens=40, seed=7)
    assert new_ids == [
        *(10, 24, 32, 32, 7, 44, 1, 24, 9, 44, 9, 15, 32, 25, 32, 34, 40, 2, 27, 9),
        *(44, 0, 46, 32, 7, 18, 32, 32, 32, 32, 32, 30, 39, 9, 32, 29, 21, 9, 29, 41),
    ]


def test_seed_decides_the_text_and_the_global_state_is_left_alone() -> None:
    model = decoder()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(model, [1, 2], max_new_tokens=20, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert generate(model, [1, 2], max_new_tokens=20, seed=5) == first
    assert generate(model, [1, 2], max_new_tokens=20, seed=6) != first


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_dropout_is_off(training: bool) -> None:
    model = decoder(dropout=0.5).train(training)
    new_ids = generate(model, [1, 2, 3], GREEDY, max_new_tokens=8)
    assert model.training is training
    assert new_ids == recomputed(model.eval(), [1, 2, 3], 8)


def test_the_prompt_is_not_changed_and_no_tokens_can_be_asked_for() -> None:
    prompt_ids = [1, 2, 3]
    assert generate(decoder(), prompt_ids, max_new_tokens=0) == []
    generate(decoder(), prompt_ids, max_new_tokens=4)
    assert prompt_ids == [1, 2, 3]


def test_a_stop_id_ends_the_text_and_is_not_part_of_it() -> None:
    model = decoder()
    whole = generate(model, [1], GREEDY, max_new_tokens=20)
    stop_id = whole[6]
    stopped = generate(model, [1], GREEDY, max_new_tokens=20, stop_ids=[stop_id, VOCAB_SIZE - 1])
    assert stopped == whole[: whole.index(stop_id)]


@pytest.mark.parametrize("prompt_length", [3, 2 * SEQ_LEN])
def test_the_repetition_penalty_is_on_all_that_was_read_and_written(prompt_length: int) -> None:
    model = decoder()
    [prompt_ids] = prompts_of(prompt_length)
    penalised = Sampling(temperature=0, repetition_penalty=1.5)
    new_ids = generate(model, prompt_ids, penalised, max_new_tokens=40)
    assert new_ids == recomputed(model, prompt_ids, 40, penalty=1.5)
    assert len(set(new_ids)) > len(set(generate(model, prompt_ids, GREEDY, max_new_tokens=40)))


def test_to_end_is_no_repetition() -> None:
    model = decoder(tie_embeddings=True)
    echoed = next(token for token in range(VOCAB_SIZE) if generate(model, [token], GREEDY, max_new_tokens=1) == [token])
    penalised = Sampling(temperature=0, repetition_penalty=1e6)
    assert generate(model, [echoed], penalised, max_new_tokens=1) != [echoed]
    assert generate(model, [echoed], penalised, max_new_tokens=1, stop_ids=[echoed]) == []


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("lengths", [(1, 7, SEQ_LEN, 3 * SEQ_LEN, 2, 15), (5, 5, 5), (1, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_greedy_batch_equals_each_text_alone(shape: str, lengths: tuple[int, ...]) -> None:
    """With stops, so that rows leave at different times, and beyond the context, so that rows are read again."""
    model = decoder(**SHAPES[shape])
    prompts, stop_ids = prompts_of(*lengths), [4, 9]
    together = generate_batch(model, prompts, GREEDY, max_new_tokens=3 * SEQ_LEN, stop_ids=stop_ids)
    alone = [generate(model, prompt, GREEDY, max_new_tokens=3 * SEQ_LEN, stop_ids=stop_ids) for prompt in prompts]
    assert together == alone
    for prompt, new_ids in zip(prompts, alone, strict=True):
        plain = recomputed(model, prompt, 3 * SEQ_LEN)
        ends = [place for place, token in enumerate(plain) if token in stop_ids]
        assert new_ids == plain[: min(ends, default=None)]


def test_what_else_is_in_a_batch_does_not_matter_to_a_sample() -> None:
    """In fp64: the products of a batch are rounded otherwise, which in fp32 may rarely turn a draw."""
    model = decoder(num_kv_heads=2).double()
    prompts, seeds = prompts_of(4, 30, 1, 12, 4), [3, 1, 4, 1, 5]
    sampling = Sampling(top_k=None, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    alone = [generate(model, p, sampling, max_new_tokens=40, seed=s) for p, s in zip(prompts, seeds, strict=True)]
    assert generate_batch(model, prompts, sampling, max_new_tokens=40, seeds=seeds) == alone
    backwards = generate_batch(model, prompts[::-1], sampling, max_new_tokens=40, seeds=seeds[::-1])
    assert backwards == alone[::-1]


def test_samples_of_one_prompt_differ_by_their_seeds() -> None:
    texts = generate_batch(decoder(), [[1, 2]] * 3, max_new_tokens=20, seeds=[0, 1, 0])
    assert texts[0] == texts[2] != texts[1]


def test_no_prompts_no_texts() -> None:
    assert generate_batch(decoder(), [], max_new_tokens=5) == []


def test_tokens_are_told_as_they_come_and_a_row_can_be_ended() -> None:
    told: list[tuple[int, int | None]] = []

    def on_token(row: int, token: int | None) -> bool:
        told.append((row, token))
        return row == 1 and len([one for one in told if one[0] == 1]) == 3

    model, prompts = decoder(), prompts_of(3, 6)
    texts = generate_batch(model, prompts, GREEDY, max_new_tokens=6, on_token=on_token)
    assert texts == [recomputed(model, prompts[0], 6), recomputed(model, prompts[1], 3)]
    assert [token for row, token in told if row == 0] == [*texts[0], None]
    assert [token for row, token in told if row == 1] == [*texts[1], None]
    assert [row for row, _ in told[:4]] == [0, 1, 0, 1]  # in turns


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": [[1], []]}, "prompt"),
        ({"prompts": [[1], [VOCAB_SIZE]]}, "vocabulary of 50, got 50 to 50"),
        ({"prompts": [[-1, 3]]}, "vocabulary of 50, got -1 to 3"),
        ({"prompts": [[1]], "max_new_tokens": -1}, "max_new_tokens .* -1"),
    ],
)
def test_an_impossible_request_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate_batch(decoder(), **({"max_new_tokens": 3} | request_))


def test_a_failure_leaves_the_mode_as_it_was() -> None:
    model = decoder().train()

    def fail(row: int, token: int | None) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_batch(model, [[1]], max_new_tokens=3, on_token=fail)
    assert model.training
