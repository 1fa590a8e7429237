"""Tokens a second and model FLOP utilisation on one GPU: `gpt2`, `small` and `medium` in bf16 at 1,024 tokens.

Every microbatch is tried eager and compiled; the fastest counts, and is then built and measured once more, which shows
how far a figure repeats. MFU = FLOPs a token (`lmtrain/model/sizing.py`: 6 per weight and token, and what a causal mask
leaves of attention) × tokens a second / peak of the card by its data sheet. Needs nothing but PyTorch and PyYAML.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import time
from typing import Any

import torch
from report import Figure, median_figure, parser, publish
from without_hydra import VOCABULARIES, Training, preset, settle

from lmtrain.training.utilisation import measured_peak, peak_flops

MIN_MFU = {"gpt2": 0.43, "small": 0.45, "medium": 0.50}
MIN_TOKENS = {"gpt2": 500_000.0}
MICRO_BATCHES = {"gpt2": (8, 16, 32), "small": (4, 8, 16), "medium": (2, 4, 8)}
BATCH, CONTEXT = 32, 1024
WARM_UP = 3  # steps; a compiler works in the first


def settings(device: str, shapes: list[str], *, quick: bool) -> dict[str, list[Training]]:
    """What is tried, by shape."""
    if quick:
        tiny = dataclasses.replace(preset("nano"), d_model=32, num_layers=1, num_heads=2)
        one = Training(
            model=tiny,
            vocab_size=256,
            seq_len=32,
            batch_size=4,
            micro_batch_size=2,
            device=device,  # type: ignore[arg-type]  # one of those there are to choose from
        )
        return {"tiny": [one, dataclasses.replace(one, micro_batch_size=4)]}
    return {
        shape: [
            Training(
                model=preset(shape),
                vocab_size=VOCABULARIES[shape],
                seq_len=CONTEXT,
                batch_size=BATCH,
                micro_batch_size=size,
                device=device,  # type: ignore[arg-type]
                compile=compiled,
            )
            for compiled in (False, True)
            for size in MICRO_BATCHES[shape]
        ]
        for shape in shapes
    }


def seconds_a_step(training: Training, num_steps: int) -> list[float] | None:
    """Of each step after some to warm up; None if that microbatch does not fit."""
    gc.collect()
    if training.device == "cuda":
        torch.cuda.empty_cache()
    try:
        step, batch, seconds = training.build(), training.random_batch(), []
        for number in range(WARM_UP + num_steps):
            settle(training.device)
            started = time.perf_counter()
            step(batch, training.lr)
            settle(training.device)
            if number >= WARM_UP:
                seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return None
    return seconds if step.micro_batch_size == training.micro_batch_size else None


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    command_line.add_argument("--shape", nargs="+", choices=MIN_MFU, default=list(MIN_MFU), help="default: all")
    command_line.add_argument("--steps", type=int, default=20, help="timed for each setting (default 20)")
    arguments = command_line.parse_args()
    device, num_steps = torch.device(arguments.device), 2 if arguments.quick else arguments.steps
    peak = peak_flops(device, torch.bfloat16)
    best_product = measured_peak(device, torch.bfloat16, torch.get_num_threads())
    figures = [Figure(name="best matrix product", value=best_product / 1e12, unit="TFLOP/s")]
    samples: dict[str, Any] = {}
    configs: dict[str, Any] = {"peak_flops": peak}
    for shape, tried in settings(arguments.device, arguments.shape, quick=arguments.quick).items():
        measured = {}
        for training in tried:
            words = f"{shape}, microbatch {training.micro_batch_size}{', compiled' if training.compile else ''}"
            seconds = seconds_a_step(training, num_steps)
            print(words if seconds else f"{words}: does not fit", flush=True)
            if seconds:
                measured[words] = training, seconds
                speeds = [training.tokens / one for one in seconds]
                figures.append(median_figure(words, speeds, unit="tokens/s"))
                samples[words] = seconds
        words, (training, _) = min(measured.items(), key=lambda item: sorted(item[1][1])[num_steps // 2])
        again = seconds_a_step(training, num_steps) or []
        samples[f"{words}, again"] = again
        tokens_a_second = training.tokens / sorted(again)[len(again) // 2]
        used = training.flops_per_token * tokens_a_second
        figures += [
            Figure(
                name=f"{shape}: the fastest again",
                value=tokens_a_second,
                unit="tokens/s",
                at_least=MIN_TOKENS.get(shape),
            ),
            Figure(name=f"{shape}: MFU", value=used / peak if peak else float("nan"), at_least=MIN_MFU.get(shape)),
            Figure(name=f"{shape}: of the best matrix product", value=used / best_product),
        ]
        configs[shape] = dataclasses.asdict(training)
    return publish("gpu_throughput", figures, config=configs, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
