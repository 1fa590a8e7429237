"""Choosing a token: drawn with the right probabilities, from the right tokens; settings out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lmtrain.errors import RunError, UsageError
from lmtrain.model.sampling import GREEDY, Sampling, choose_token

LOGITS = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()  # not in order
DRAWS = 3000


def frequencies(logits: torch.Tensor = LOGITS, repeated: list[int] | None = None, **settings: Any) -> Any:
    """Shares of the tokens among many draws."""
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**({"temperature": 1.0, "top_k": None} | settings))
    repeated_V = None
    if repeated is not None:
        repeated_V = torch.zeros(len(logits), dtype=torch.bool)
        repeated_V[repeated] = True
    draws = [choose_token(logits, sampling, generator, repeated_V) for _ in range(DRAWS)]
    return torch.bincount(torch.tensor(draws), minlength=len(logits)) / DRAWS


def close(drawn: torch.Tensor, expected: list[float]) -> bool:
    """To four standard errors; what should not come does not come."""
    wanted = torch.tensor(expected) / sum(expected)
    return bool(torch.all((drawn - wanted).abs() <= 4 * (wanted * (1 - wanted) / DRAWS).sqrt()))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_k": 99}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, [0.15**2, 0.5**2, 0.05**2, 0.3**2]),
        ({"top_k": 2}, [0, 0.5, 0, 0.3]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_p": 0.81}, [0.15, 0.5, 0, 0.3]),  # two reach 0.8
        ({"top_p": 0.79}, [0, 0.5, 0, 0.3]),
        ({"top_p": 0.001}, [0, 1, 0, 0]),  # the likeliest is never left out
        ({"min_p": 0.29}, [0.15, 0.5, 0, 0.3]),  # at least 0.145
        ({"min_p": 0.31}, [0, 0.5, 0, 0.3]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.84}, [0, 0.5, 0, 0.3]),  # of what top-k leaves, two have 0.842
        ({"top_p": 0.97, "min_p": 0.5}, [0, 0.5, 0, 0.3]),
        ({"temperature": 2.0, "min_p": 0.6}, [0, 0.5**0.5, 0, 0.3**0.5]),  # after the temperature: 0.55, 1, 0.32, 0.77
    ],
)
def test_tokens_are_drawn_with_their_probabilities(settings: dict[str, Any], expected: list[float]) -> None:
    assert close(frequencies(**settings), expected)


def test_equal_tokens_have_equal_chances() -> None:
    assert close(frequencies(torch.zeros(5), top_p=0.999, min_p=1.0), [1, 1, 1, 1, 1])


def test_a_repeated_token_is_less_likely_whatever_its_sign() -> None:
    logits = torch.tensor([1.0, -1.0, 0.5, -1.0])
    weights = [math.exp(x) for x in (1.0 / 2, -1.0 * 2, 0.5, -1.0)]
    assert close(frequencies(logits, repeated=[0, 1], repetition_penalty=2.0), weights)
    assert choose_token(logits, Sampling(temperature=0, repetition_penalty=3.0), torch.Generator()) == 0
    repeated_V = torch.tensor([True, False, False, False])
    assert choose_token(logits, Sampling(temperature=0, repetition_penalty=3.0), torch.Generator(), repeated_V) == 2


def test_a_very_low_temperature_is_greedy_and_finite() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0])
    assert choose_token(logits_V, Sampling(temperature=1e-6), torch.Generator()) == 1
    assert choose_token(logits_V, GREEDY, torch.Generator()) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_told(value: float, temperature: float) -> None:
    with pytest.raises(RunError, match=r"largest logit is (nan|inf)"):
        choose_token(torch.tensor([1.0, value, 2.0]), Sampling(temperature=temperature), torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature .* -0.5"),
        ({"temperature": math.nan}, "temperature .* nan"),
        ({"temperature": math.inf}, "temperature .* inf"),
        ({"temperature": 1e-9}, "temperature .* 1e-09"),
        ({"top_k": 0}, "top_k .* 0"),
        ({"top_p": 0.0}, "top_p .* 0.0"),
        ({"top_p": 1.1}, "top_p .* 1.1"),
        ({"top_p": math.nan}, "top_p .* nan"),
        ({"min_p": -0.1}, "min_p .* -0.1"),
        ({"min_p": 2.0}, "min_p .* 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty .* 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty .* inf"),
    ],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**settings)
