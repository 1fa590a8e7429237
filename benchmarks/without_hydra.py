"""Training assembled by hand, for machines where neither Hydra nor the data libraries are installed.

A GPU machine often has PyTorch and little else. What is built here is what a session builds: the model of a preset, its
optimizers, and `TrainingStep`; batches are of random tokens. Imports nothing of lmtrain that needs more than PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml

from lmtrain.config.schema import AdafactorConfig, AdamWConfig, DecoderConfig, LionConfig, MuonConfig, OptimizerConfig
from lmtrain.data.batches import Batch
from lmtrain.hardware import FORMATS
from lmtrain.model.building import build_model
from lmtrain.model.sizing import flops_per_token
from lmtrain.training.activation_checkpointing import checkpoint_activations
from lmtrain.training.activations import Workload
from lmtrain.training.footprint import TrainingMemory
from lmtrain.training.optimizers import build_optimizers
from lmtrain.training.precision import Precision
from lmtrain.training.step import TrainingStep

PRESETS = Path(__file__).resolve().parent.parent / "conf" / "model"
VOCABULARIES = {"gpt2": 50257, "small": 32000, "medium": 32000, "nano": 2048}
OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "lion": LionConfig,
    "adafactor": AdafactorConfig,
}


def preset(name: str) -> DecoderConfig:
    """A shipped decoder."""
    values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert values.pop("defaults") == ["_decoder", "_self_"], f"model={name} builds on other options"
    return DecoderConfig(**values)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One way to train one shape."""

    model: DecoderConfig
    vocab_size: int
    seq_len: int
    batch_size: int
    micro_batch_size: int
    device: Literal["cpu", "cuda"]
    format: Literal["fp32", "bf16", "fp16"] = "bf16"
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    checkpointing: Literal["none", "selective", "full"] = "none"
    dropout: float = 0.0
    compile: bool = False
    lr: float = 1e-4

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.model, self.vocab_size, self.seq_len)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.seq_len

    @property
    def memory(self) -> TrainingMemory:
        """As the formulas have it."""
        work = Workload(
            model=self.model,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            format=self.format,
            device=self.device,
            dropout=self.dropout,
            checkpointing=self.checkpointing,
        )
        return TrainingMemory(work=work, optimizer=self.optimizer)

    def build(self, seed: int = 0) -> TrainingStep:
        """The step, with a model of random weights on the device."""
        torch.manual_seed(seed)
        device = torch.device(self.device)
        model = build_model(self.model, vocab_size=self.vocab_size, seq_len=self.seq_len, dropout=self.dropout)
        model.to(device)
        checkpoint_activations(model.all_blocks(), self.checkpointing)
        step = TrainingStep(
            model,
            build_optimizers(self.optimizer, model.parameters(), model.block_matrices(), self.lr),
            Precision(device, FORMATS[self.format]),
            grad_clip=1.0,
            micro_batch_size=self.micro_batch_size,
        )
        if self.compile:
            step.compile(dynamic=False)
        return step

    def random_batch(self) -> Batch:
        """In page-locked memory if a GPU is to read it."""
        ids_BT = torch.randint(self.vocab_size, (self.batch_size, self.seq_len + 1))
        batch = Batch(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), num_targets=self.tokens)
        return batch.pin_memory() if self.device == "cuda" else batch


def settle(device: str) -> None:
    """Wait until the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
