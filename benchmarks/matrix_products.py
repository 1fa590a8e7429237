"""How much of this device's peak the model's own matrix products reach, and how much of it a whole step.

The peak is the best of large square products, measured. Then come the products of the model: of every matrix the
forward one and the two of the backward pass, at the rows of one microbatch. In every round peak, products and a whole
step are timed, so that a machine that slows down slows all of them; ratios are taken within rounds.

MFU = FLOPs a token × tokens a second / peak. FLOPs a token (`lmtrain/model/sizing.py`) are 6 for every weight of a
matrix product, and 12 × layers × width × keys a query sees for attention. Needs nothing but PyTorch and PyYAML.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from report import median_figure, parser, publish
from torch import Tensor
from without_hydra import VOCABULARIES, Training, preset, settle

from lmtrain.hardware import FORMATS
from lmtrain.model.sizing import Shape, block_shapes

SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
# sequences, tokens of each
BATCHES = {
    "cpu": {"nano": (8, 256), "gpt2": (1, 256), "small": (1, 256)},
    "cuda": {"nano": (64, 256), "gpt2": (32, 1024), "small": (8, 1024), "medium": (4, 1024)},
}


def fastest(work: Callable[[], object], device: str, *, at_least: float) -> float:
    """Seconds of the fastest call within about `at_least` seconds; two at the least."""
    best, began, calls = float("inf"), time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - began < at_least:
        settle(device)
        started = time.perf_counter()
        work()
        settle(device)
        best, calls = min(best, time.perf_counter() - started), calls + 1
    return best


class Products:
    """The three products of a matrix (N × K) with M rows."""

    def __init__(self, shape: Shape, rows: int, format: torch.dtype, device: str) -> None:
        outputs, inputs = shape
        self.flops = 2.0 * rows * outputs * inputs  # of each
        x_MK, w_NK, dy_MN = (
            torch.randn(size, device=device).to(format) for size in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        self.calls: dict[str, Callable[[], Tensor]] = {
            "forward": lambda: x_MK @ w_NK.T,
            "gradient of the input": lambda: dy_MN @ w_NK,
            "gradient of the weight": lambda: dy_MN.T @ x_MK,
        }


def peak(format: torch.dtype, device: str, *, quick: bool, seconds: float) -> float:
    """FLOP/s of the best square product."""
    best = 0.0
    for width in (256,) if quick else SQUARES[device]:
        square = torch.randn((width, width), device=device).to(format)
        best = max(best, 2 * width**3 / fastest(lambda square=square: square @ square, device, at_least=seconds))
    return best


def matrices(training: Training) -> Counter[Shape]:
    """Every matrix a token meets, the output layer included."""
    shapes = Counter(shape for block in block_shapes(training.model) for shape in block.matrices)
    shapes[training.vocab_size, training.model.d_model] += 1
    return shapes


def measure_round(training: Training, step: Callable[[], object], *, quick: bool) -> dict[str, float]:
    """Shares of the peak, and the peak itself in FLOP/s."""
    seconds = 0.01 if quick else 0.15
    format, device = FORMATS[training.format], training.device
    best = peak(format, device, quick=quick, seconds=seconds)
    shares: dict[str, float] = {}
    total_flops = total_seconds = 0.0
    for shape, number in matrices(training).items():
        products = Products(shape, training.micro_batch_size * training.seq_len, format, device)
        for kind, call in products.calls.items():
            took = fastest(call, device, at_least=seconds / 3)
            shares[f"{shape[0]} x {shape[1]}, {kind}"] = products.flops / took / best
            total_flops, total_seconds = total_flops + number * products.flops, total_seconds + number * took
    shares["all products"] = total_flops / total_seconds / best
    took = fastest(step, device, at_least=2 * seconds)
    shares["whole step: MFU"] = training.flops_per_token * training.tokens / took / best
    return shares | {"peak": best}


def trainings(device: Any, shapes: list[str], *, quick: bool) -> dict[str, Training]:
    format: Any = "fp32" if device == "cpu" else "bf16"
    if quick:
        model = dataclasses.replace(preset("nano"), d_model=64, num_layers=1)
        tiny = Training(
            model=model, vocab_size=256, seq_len=32, batch_size=2, micro_batch_size=2, device=device, format=format
        )
        return {"tiny": tiny}
    found = {}
    for shape in shapes:
        batch_size, seq_len = BATCHES[device][shape]
        found[shape] = Training(
            model=preset(shape),
            vocab_size=VOCABULARIES[shape],
            seq_len=seq_len,
            batch_size=batch_size,
            micro_batch_size=batch_size,
            device=device,
            format=format,
        )
    return found


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command_line.add_argument("--shape", nargs="+", choices=VOCABULARIES, help="default: all that suit the device")
    command_line.add_argument("--rounds", type=int, default=6, help="default 6")
    command_line.add_argument("--threads", type=int, help="of the CPU; default: those PyTorch takes")
    arguments = command_line.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes = arguments.shape or list(BATCHES[arguments.device])
    rounds = 1 if arguments.quick else arguments.rounds
    figures, samples, configs = [], {}, {}
    for name, training in trainings(arguments.device, shapes, quick=arguments.quick).items():
        print(f"{name}: {rounds} rounds", flush=True)
        step, batch = training.build(), training.random_batch()

        def whole_step(step: Any = step, batch: Any = batch, lr: float = training.lr) -> None:
            step(batch, lr)

        measured = [measure_round(training, whole_step, quick=arguments.quick) for _ in range(rounds)]
        samples[name] = {key: [one[key] for one in measured] for key in measured[0]}
        figures.append(median_figure(f"{name}: peak", [one["peak"] / 1e9 for one in measured], unit="GFLOP/s"))
        figures += [median_figure(f"{name}: {key}", values) for key, values in samples[name].items() if key != "peak"]
        configs[name] = dataclasses.asdict(training) | {"threads": torch.get_num_threads()}
    return publish("matrix_products", figures, config=configs, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
