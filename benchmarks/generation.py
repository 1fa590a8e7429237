"""What the cache of keys and values gains over computing the whole text again for every token, and what batches gain.

One model of random weights writes the same text of 512 tokens both ways, in turns and in one process, always taking the
likeliest token; how many tokens differ is a figure too. Then 16 prompts of different lengths are continued together
and one after the other.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from report import Figure, median_figure, median_interval, parser, publish

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import SentencePieceBpeConfig
from lmtrain.hardware import choose_device, set_threads
from lmtrain.model.building import build_model
from lmtrain.model.decoder import Decoder
from lmtrain.model.generation import generate, generate_batch
from lmtrain.model.sampling import DEFAULT_SAMPLING, GREEDY

LENGTH = 512  # tokens of a text, the first given
TARGET = 5.0
PROMPTS = 16
NEW_TOKENS = 128  # of each text of a batch


def random_model(overrides: list[str]) -> tuple[Decoder, dict[str, Any]]:
    """A model whose text varies, and the settings it is made by; how long a token takes depends on no weight."""
    config = compose_config([f"data.seq_len={LENGTH}", *overrides])
    set_threads(config.parallel.num_threads)
    assert isinstance(config.tokenizer, SentencePieceBpeConfig)
    torch.manual_seed(config.seed)
    model = build_model(config.model, vocab_size=config.tokenizer.vocab_size, seq_len=LENGTH, dropout=0.0)
    with torch.no_grad():
        for matrix in model.block_matrices():
            matrix.normal_(std=0.2)
    return model.to(choose_device(config.device)).eval(), dataclasses.asdict(config)


@torch.inference_mode()
def recompute(model: Decoder, length: int) -> list[int]:
    """Greedy text without a cache."""
    context = torch.zeros((1, 1), dtype=torch.int64, device=model.embedding.weight.device)
    while context.size(1) < length:
        context = torch.cat([context, model(context)[:, -1:].argmax(dim=-1)], dim=1)
    return context[0, 1:].tolist()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def ratio_figure(name: str, ratios: list[float], *, at_least: float | None = None) -> Figure:
    return Figure(
        name=name, value=statistics.median(ratios), unit="x", interval=median_interval(ratios), at_least=at_least
    )


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=12, help="texts written each way (default 12)")
    command_line.add_argument("overrides", nargs="*", help="settings of the model, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    rounds, length = (1, 64) if arguments.quick else (arguments.rounds, LENGTH)
    model, config = random_model(["model=nano", *arguments.overrides])
    prompts = [[number] * (1 + 7 * number) for number in range(PROMPTS)]
    seeds = range(PROMPTS)

    def one_by_one() -> list[list[int]]:
        return [
            generate(model, prompt, DEFAULT_SAMPLING, max_new_tokens=NEW_TOKENS, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    samples: dict[str, list[float]] = {"cached": [], "recomputed": [], "together": [], "one by one": []}
    differing = 0
    generate(model, [0], GREEDY, max_new_tokens=length - 1)  # warm
    recompute(model, length=32)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        seconds, text = timed(lambda: generate(model, [0], GREEDY, max_new_tokens=length - 1))
        samples["cached"].append(seconds)
        seconds, expected = timed(lambda: recompute(model, length))
        samples["recomputed"].append(seconds)
        differing += sum(a != b for a, b in zip(text, expected, strict=True))
        seconds, _ = timed(lambda: generate_batch(model, prompts, max_new_tokens=NEW_TOKENS, seeds=list(seeds)))
        samples["together"].append(seconds)
        samples["one by one"].append(timed(one_by_one)[0])

    def ratios(slow: str, fast: str) -> list[float]:
        return [a / b for a, b in zip(samples[slow], samples[fast], strict=True)]

    def speeds(name: str, tokens: int) -> list[float]:
        return [tokens / seconds for seconds in samples[name]]

    figures = [
        ratio_figure(f"{length} tokens: recomputed / cached", ratios("recomputed", "cached"), at_least=TARGET),
        Figure(name="tokens that differ", value=differing, at_most=0),
        Figure(name="different tokens in a text", value=len(set(text))),
        median_figure("cached", speeds("cached", length - 1), unit="tokens/s"),
        median_figure("recomputed", speeds("recomputed", length - 1), unit="tokens/s"),
        ratio_figure(f"{PROMPTS} prompts: one by one / together", ratios("one by one", "together")),
        median_figure("together", speeds("together", PROMPTS * NEW_TOKENS), unit="tokens/s"),
    ]
    return publish("generation", figures, config=config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
