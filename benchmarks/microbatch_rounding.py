"""Does the microbatch change a run by more than rounding does? Loss trajectories of the same run, cut differently.

The whole batch in one pass is compared with microbatches of a half, a quarter and one sequence. What rounding alone
does is shown by the whole batch with its rows in another order: the same mathematics, other sums. Every loss is that of
the whole batch in its first order, computed apart, so that only the weights can differ. A deviation is the largest
relative difference of a run's losses from those of the whole batch; it grows along a run, as training amplifies the
last bit. The same runs in fp64, where nothing may be left of it, show that the mathematics are equal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from report import Figure, median_figure, parser, publish

from lmtrain.config.compose import compose_config
from lmtrain.config.schema import ExperimentConfig
from lmtrain.data.batches import Batch
from lmtrain.data.prepare import prepare
from lmtrain.data.prepared import PreparedData
from lmtrain.hardware import set_threads
from lmtrain.session import build_session
from lmtrain.training.schedules import lr_at

BATCH = 16
STEPS = 50
CUTS = {"half": BATCH // 2, "quarter": BATCH // 4, "one sequence": 1}
RATES = {"adamw": 0.002, "muon": 0.006}  # about the best of each; a rate too high amplifies any difference
FP64_TARGET = 1e-11
SETTINGS = [
    *("data=text", f"data.path={argparse.__file__}", "tokenizer=char", "data.seq_len=32", "dropout=0"),
    *("model.d_model=64", "model.num_layers=2", "model.num_heads=4", "precision=fp32", "device=cpu"),
    *(f"batch_size={BATCH}", f"trainer.max_steps={STEPS}", "parallel.num_threads=1"),
]
"""A text that can be learned: on noise the weights hardly move, and nor do the losses."""


def trajectory(
    config: ExperimentConfig,
    data: PreparedData,
    *,
    micro_batch_size: int = BATCH,
    order: Sequence[int] = range(BATCH),
    double: bool = False,
) -> list[float]:
    """The loss before every step; `order`: the rows of each batch as the step sees them."""
    session = build_session(config, data, torch.device("cpu"))
    session.step.micro_batch_size = micro_batch_size
    model = session.model.double() if double else session.model
    losses = []
    for number in range(STEPS):
        batch = session.batches[number]
        with torch.no_grad():
            logits = model(batch.inputs).flatten(0, 1)
            losses.append(F.cross_entropy(logits.double(), batch.targets.flatten()).item())
        session.step(reorder(batch, order), lr_at(config.schedule, number, lr=config.lr, total_steps=STEPS))
    return losses


def reorder(batch: Batch, order: Sequence[int]) -> Batch:
    rows = list(order)
    return replace(batch, inputs=batch.inputs[rows], targets=batch.targets[rows])


def deviation(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(loss - other) / other for loss, other in zip(losses, reference, strict=True))


def deviations(config: ExperimentConfig, data: PreparedData, orders: int, *, double: bool = False) -> dict[str, Any]:
    """Of every cut, and of so many orders of the rows."""
    whole = trajectory(config, data, double=double)
    shuffles = [torch.randperm(BATCH, generator=torch.Generator().manual_seed(n)).tolist() for n in range(orders)]
    cut = {
        name: deviation(trajectory(config, data, micro_batch_size=size, double=double), whole)
        for name, size in CUTS.items()
    }
    shuffled = [deviation(trajectory(config, data, order=order, double=double), whole) for order in shuffles]
    return {**cut, "other orders": shuffled}


def figures_of(optimizer: str, samples: list[dict[str, Any]]) -> list[Figure]:
    """Each cut against rounding alone: the largest deviation of all seeds; for the half, the usual one too."""
    rounding = [value for sample in samples for value in sample["other orders"]]
    figures = [Figure(name=f"{optimizer}: largest deviation by rounding alone", value=max(rounding))]
    for name in CUTS:
        ratio = max(sample[name] for sample in samples) / max(rounding)
        figures.append(Figure(name=f"{optimizer}, {name}: largest / largest by rounding", value=ratio, at_most=1.0))
    usual = [sample["half"] / statistics.median(sample["other orders"]) for sample in samples]
    return [*figures, median_figure(f"{optimizer}, half: deviation / median by rounding, by seed", usual)]


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--seeds", type=int, default=8, help="runs of each kind (default 8)")
    command_line.add_argument("--orders", type=int, default=6, help="orders of the rows per seed (default 6)")
    arguments = command_line.parse_args()
    seeds, orders = (2, 2) if arguments.quick else (arguments.seeds, arguments.orders)
    figures: list[Figure] = []
    samples: dict[str, Any] = {}
    configs = {name: compose_config([*SETTINGS, f"optimizer={name}", f"lr={lr}"]) for name, lr in RATES.items()}
    set_threads(configs["adamw"].parallel.num_threads)
    data = prepare(configs["adamw"].data, configs["adamw"].tokenizer)
    for name, config in configs.items():
        samples[name] = [deviations(replace(config, seed=seed), data, orders) for seed in range(seeds)]
        figures += figures_of(name, samples[name])
    # Muon makes its matrices orthogonal in fp32 whatever their format, so only AdamW can show this.
    samples["fp64"] = deviations(configs["adamw"], data, 1, double=True)
    exact = max(samples["fp64"][name] for name in CUTS)
    figures.append(Figure(name="adamw in fp64: largest deviation of any microbatch", value=exact, at_most=FP64_TARGET))
    settings = {name: asdict(config) for name, config in configs.items()}
    for resolved in settings.values():
        resolved["data"]["path"] = Path(argparse.__file__).name  # where it lies differs by machine
    return publish("microbatch_rounding", figures, config=settings, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
