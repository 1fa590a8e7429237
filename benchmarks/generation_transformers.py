"""Our `generate` against that of transformers, on one model, exported: both continue the same prompts greedily.

The model has the size of `nano` in a shape that the Llama format holds, and random weights that give varied text. Both
run in one process with the same number of threads, in turns: one prompt, and a batch of prompts of equal length, so
that neither has to fill rows up. How many tokens differ is a figure too.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from generation import random_model, ratio_figure, timed
from report import Figure, median_figure, parser, publish

from lmtrain.model.decoder import Decoder
from lmtrain.model.generation import generate_batch
from lmtrain.model.huggingface.choice import nearest_format
from lmtrain.model.huggingface.writing import write_model
from lmtrain.model.sampling import GREEDY

SHAPE = ["model=nano", "model.activation=swiglu", "model.qk_norm=false"]
TARGET = 1.5
NEW_TOKENS = 256
PROMPT_TOKENS = 32
BATCH = 8


def opened_in_transformers(model: Decoder) -> Any:
    """The same model as transformers reads it from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(
            Path(folder), model, nearest_format(model.config), dtype=torch.float32, end_ids=[model.vocab_size - 1]
        )
        opened = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    opened.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    return opened


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--rounds", type=int, default=12, help="texts written by each (default 12)")
    command_line.add_argument("overrides", nargs="*", help="settings of the model, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    rounds, length = (1, 16) if arguments.quick else (arguments.rounds, NEW_TOKENS)
    model, config = random_model([*SHAPE, *arguments.overrides])
    peer = opened_in_transformers(model)
    prompts_BT = torch.randint(model.vocab_size, (BATCH, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))

    def ours(rows: int) -> list[list[int]]:
        return generate_batch(model, prompts_BT[:rows].tolist(), GREEDY, max_new_tokens=length)

    def theirs(rows: int) -> list[list[int]]:
        new_BT = peer.generate(prompts_BT[:rows], max_new_tokens=length)[:, PROMPT_TOKENS:]
        return [list(map(int, row)) for row in new_BT]

    samples: dict[str, list[float]] = {}
    differing = 0
    for rows in (1, BATCH):  # warm
        ours(rows), theirs(rows)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        for rows in (1, BATCH):
            seconds, text = timed(lambda rows=rows: ours(rows))  # type: ignore[misc]
            samples.setdefault(f"ours, {rows}", []).append(seconds)
            seconds, expected = timed(lambda rows=rows: theirs(rows))  # type: ignore[misc]
            samples.setdefault(f"transformers, {rows}", []).append(seconds)
            differing += sum(
                a != b for row, other in zip(text, expected, strict=True) for a, b in zip(row, other, strict=True)
            )

    def ratios(rows: int) -> list[float]:
        return [a / b for a, b in zip(samples[f"transformers, {rows}"], samples[f"ours, {rows}"], strict=True)]

    figures = [
        ratio_figure("one prompt: transformers / ours", ratios(1), at_least=TARGET),
        ratio_figure(f"{BATCH} prompts: transformers / ours", ratios(BATCH), at_least=TARGET),
        Figure(name="tokens that differ", value=differing, at_most=0),
        Figure(name="different tokens in a text", value=len(set(text[0]))),
        median_figure("ours, one prompt", [length / s for s in samples["ours, 1"]], unit="tokens/s"),
        median_figure("transformers, one prompt", [length / s for s in samples["transformers, 1"]], unit="tokens/s"),
    ]
    config |= {"parameters": sum(p.numel() for p in model.parameters()), "transformers": transformers.__version__}
    return publish("generation_transformers", figures, config=config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
