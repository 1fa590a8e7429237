"""A minimal GPT and its trainer, as short as they can be: the peer that a user would otherwise write.

LayerNorm, learned positions, GELU, tied embeddings, no biases, no dropout; AdamW, a linear warm-up and a cosine; random
windows of an array of tokens. Eager, in the number format that it is given.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

PEAK_LR, FINAL_LR, WARMUP_STEPS, TOTAL_STEPS = 1e-3, 1e-4, 100, 2000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of the model and of its batches."""

    vocab_size: int
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 12


class Block(nn.Module):
    """Pre-normalised attention and feed-forward, without biases."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm_1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x_BTD)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.output(attended.transpose(1, 2).flatten(2))
        y_BTD: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))
        return y_BTD


class MinimalGpt(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.position.weight[: tokens_BT.size(1)]
        return F.linear(self.norm(self.blocks(x_BTD)), self.embedding.weight)


class MinimalLoop:
    """The minimal GPT, its optimizer and its random batches. Call it to make steps."""

    def __init__(
        self,
        shape: Shape,
        tokens: NDArray[np.unsignedinteger],  # type: ignore[type-arg]
        *,
        seed: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # a constant
        format: torch.dtype = torch.float32,
    ) -> None:
        """`tokens` may be mapped from a file."""
        torch.manual_seed(seed)
        self.shape, self.tokens, self.device, self.format = shape, tokens, device, format
        self.draw = np.random.default_rng(seed)
        self.model = MinimalGpt(shape).to(device)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        gains = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
            betas=(0.9, 0.99),
            fused=True,
        )
        self.step = 0

    def __call__(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.train_on(*self.batch())

    def timed(self, num_steps: int) -> list[float]:
        """Make steps on a CPU; returns the seconds of each."""
        seconds = []
        for _ in range(num_steps):
            started = time.perf_counter()
            self(1)
            seconds.append(time.perf_counter() - started)
        return seconds

    def batch(self) -> tuple[Tensor, Tensor]:
        starts = self.draw.integers(len(self.tokens) - self.shape.context, size=(self.shape.batch, 1))
        windows = self.tokens[starts + np.arange(self.shape.context + 1)]
        drawn = torch.from_numpy(windows.astype(np.int64)).to(self.device)
        return drawn[:, :-1], drawn[:, 1:]

    def train_on(self, inputs_BT: Tensor, targets_BT: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step)
        with torch.autocast(self.device.type, dtype=self.format, enabled=self.format != torch.float32):
            loss = F.cross_entropy(self.model(inputs_BT).flatten(0, 1), targets_BT.reshape(-1))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def loss_over(self, tokens: NDArray[np.unsignedinteger]) -> float:  # type: ignore[type-arg]
        """Nats a token over all of these, but for what does not fill a window."""
        context = self.shape.context
        windows = (len(tokens) - 1) // context
        ids = torch.from_numpy(tokens[: windows * context + 1].astype(np.int64)).to(self.device)
        inputs, targets = ids[:-1].view(windows, context), ids[1:].view(windows, context)
        total = torch.zeros((), dtype=torch.float64)
        for some_inputs, some_targets in zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True):
            logits = self.model(some_inputs)
            total += F.cross_entropy(logits.flatten(0, 1), some_targets.flatten(), reduction="sum").double().cpu()
        return total.item() / inputs.numel()


def learning_rate(step: int) -> float:
    """A linear warm-up, then half a cosine down to the final rate."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / (WARMUP_STEPS + 1)
    progress = min(1.0, (step - WARMUP_STEPS) / (TOTAL_STEPS - WARMUP_STEPS))
    return FINAL_LR + 0.5 * (1 + math.cos(math.pi * progress)) * (PEAK_LR - FINAL_LR)
