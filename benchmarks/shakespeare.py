"""`experiment=shakespeare_char` against a minimal GPT trainer, side by side on one machine.

The minimal GPT is written out below: LayerNorm, learned positions, GELU, AdamW and a cosine, at the setting that is
on record with a validation loss of 1.886 after 2,000 steps. Before and after each of our runs it trains for a while,
which gives the time a step takes it now; ours is compared with 2,000 such steps. `--reference` makes the 2,000 steps
and evaluates, to see what this machine says to the loss on record.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from report import Figure, median_figure, parser, publish, run_lmtrain
from torch import Tensor, nn

from lmtrain.run_dir import RunDir

MAX_LOSS, MAX_SECONDS = 1.88, 40.0
REFERENCE_STEPS, REFERENCE_LOSS = 2000, 1.886
BATCH, CONTEXT, LAYERS, HEADS, WIDTH = 12, 64, 4, 4, 128
PEAK_LR, FINAL_LR, WARMUP_STEPS = 1e-3, 1e-4, 100


class Block(nn.Module):
    """Pre-normalised attention and feed-forward, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.qkv(self.norm_1(x_BTD)).split(WIDTH, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.output(attended.transpose(1, 2).flatten(2))
        y_BTD: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))
        return y_BTD


class MinimalGpt(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.position.weight[: tokens_BT.size(1)]
        return F.linear(self.norm(self.blocks(x_BTD)), self.embedding.weight)


class MinimalTrainer:
    """The minimal GPT, its optimizer and its random batches of characters."""

    def __init__(self, text: str, seed: int) -> None:
        torch.manual_seed(seed)
        ids = {character: number for number, character in enumerate(sorted(set(text)))}
        tokens = torch.tensor([ids[character] for character in text])
        self.train, self.val = torch.tensor_split(tokens, [int(0.9 * len(tokens))])
        self.model = MinimalGpt(len(ids))
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        gains = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
            betas=(0.9, 0.99),
            fused=True,
        )
        self.step = 0

    def run(self, num_steps: int) -> list[float]:
        """Train; returns the seconds of each step."""
        seconds = []
        for _ in range(num_steps):
            started = time.perf_counter()
            self._train_on(*self._batch())
            seconds.append(time.perf_counter() - started)
        return seconds

    def _batch(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.train) - CONTEXT, (BATCH, 1))
        windows = self.train[starts + torch.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, 1:]

    def _train_on(self, inputs_BT: Tensor, targets_BT: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step)
        loss = F.cross_entropy(self.model(inputs_BT).flatten(0, 1), targets_BT.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats a character over the whole last tenth, but for what does not fill a window."""
        num_windows = (len(self.val) - 1) // CONTEXT
        inputs = self.val[: num_windows * CONTEXT].view(num_windows, CONTEXT)
        targets = self.val[1 : num_windows * CONTEXT + 1].view(num_windows, CONTEXT)
        total = torch.zeros((), dtype=torch.float64)
        for some_inputs, some_targets in zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True):
            logits = self.model(some_inputs)
            total += F.cross_entropy(logits.flatten(0, 1), some_targets.flatten(), reduction="sum").double()
        return total.item() / inputs.numel()


def learning_rate(step: int) -> float:
    """A linear warm-up, then half a cosine down to the final rate."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / (WARMUP_STEPS + 1)
    progress = (step - WARMUP_STEPS) / (REFERENCE_STEPS - WARMUP_STEPS)
    return FINAL_LR + 0.5 * (1 + math.cos(math.pi * progress)) * (PEAK_LR - FINAL_LR)


@dataclass(frozen=True, kw_only=True)
class OurRun:
    """What a run of the experiment ended with."""

    loss: float  # over the whole validation split, at the end
    training_seconds: float  # evaluation, checkpoints and the sample not counted
    wall_seconds: float  # of the whole program
    config: dict[str, Any]


def run_ours(path: Path, seed: int, overrides: list[str], temporary: Path) -> OurRun:
    folder = RunDir(temporary / f"seed_{seed}")
    arguments = ["experiment=shakespeare_char", f"data.path='{path.resolve()}'", f"seed={seed}", *overrides]
    wall = run_lmtrain([*arguments, f"hydra.run.dir='{folder.path}'"], folder=temporary, cache=temporary / "cache")
    result = folder.read_result()
    assert result is not None
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    return OurRun(
        loss=result["metrics"]["val/loss"],
        training_seconds=result["training_seconds"],
        wall_seconds=wall,
        config=config,
    )


def summarize(ours: list[OurRun], bare_seconds: list[list[float]]) -> list[Figure]:
    """The figures of our runs and, for each of them, the step times of the minimal GPT around it."""
    references = [REFERENCE_STEPS * statistics.median(seconds) for seconds in bare_seconds]
    ratios = [run.training_seconds / reference for run, reference in zip(ours, references, strict=True)]
    return [
        Figure(name="validation loss, worst seed", value=max(run.loss for run in ours), unit="nats", at_most=MAX_LOSS),
        Figure(
            name="training time, slowest seed",
            value=max(run.training_seconds for run in ours),
            unit="s",
            at_most=MAX_SECONDS,
        ),
        median_figure("validation loss", [run.loss for run in ours], unit="nats"),
        median_figure("training time", [run.training_seconds for run in ours], unit="s"),
        median_figure("whole program", [run.wall_seconds for run in ours], unit="s"),
        median_figure("minimal GPT", [1e3 * s for seconds in bare_seconds for s in seconds], unit="ms a step"),
        median_figure("training time / 2,000 steps of the minimal GPT", ratios),
    ]


def train_reference(text: str) -> list[Figure]:
    """The minimal GPT trained to its end."""
    reference = MinimalTrainer(text, seed=0)
    seconds = sum(reference.run(REFERENCE_STEPS))
    loss = reference.validation_loss()
    return [
        Figure(name=f"minimal GPT, loss (on record: {REFERENCE_LOSS})", value=loss, unit="nats"),
        Figure(name="minimal GPT, 2,000 steps", value=seconds, unit="s"),
    ]


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("path", type=Path, help="the text: tinyshakespeare's input.txt")
    command_line.add_argument("--seeds", type=int, default=3, help="runs, with seeds from 0 (default 3)")
    command_line.add_argument("--steps", type=int, default=200, help="of the minimal GPT around each run (default 200)")
    command_line.add_argument("--reference", action="store_true", help="train the minimal GPT to its end as well")
    command_line.add_argument("overrides", nargs="*", help="settings for our runs, as parallel.num_threads=1")
    arguments = command_line.parse_intermixed_args()
    seeds, half = arguments.seeds, arguments.steps // 2
    if arguments.quick:
        seeds, half, arguments.overrides = (
            1,
            10,
            ["trainer.max_steps=20", "trainer.eval_batches=2", *arguments.overrides],
        )

    minimal = MinimalTrainer(arguments.path.read_text(encoding="utf-8"), seed=0)
    minimal.run(5)  # the first steps set up memory and the optimizer's state
    bare_seconds: list[list[float]] = []
    ours: list[OurRun] = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(seeds):
            before = minimal.run(half)
            ours.append(run_ours(arguments.path, seed, arguments.overrides, Path(temporary)))
            bare_seconds.append(before + minimal.run(half))
            print(f"seed {seed}: loss {ours[-1].loss:.4f} after {ours[-1].training_seconds:.1f} s of training")

    figures = summarize(ours, bare_seconds)
    if arguments.reference:
        figures += train_reference(arguments.path.read_text(encoding="utf-8"))
    samples = {
        "loss": [run.loss for run in ours],
        "training_seconds": [run.training_seconds for run in ours],
        "wall_seconds": [run.wall_seconds for run in ours],
        "minimal_gpt_step_seconds": bare_seconds,
    }
    return publish("shakespeare", figures, config=ours[0].config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
