"""Settings of the loop, the number format and the processors of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmtrain.config.schema.rules import REQUIRED, require, require_fraction, require_positive


@dataclass(kw_only=True)
class PrecisionConfig:
    """The number format of the forward and backward pass; weights and optimizer state are always fp32.

    `auto` is decided once: the run's own `config.yaml` names what was chosen.
    """

    format: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = REQUIRED
    tf32: bool | Literal["auto"] = "auto"  # round fp32 products on GPUs to TF32; auto: beside 16-bit formats only


@dataclass(kw_only=True)
class TrainerConfig:
    """How long and how the run goes."""

    max_steps: int | None = None  # budget in optimizer steps ...
    max_epochs: float | None = None  # ... or passes over the training text
    max_tokens: int | None = None  # ... or tokens; exactly one of the three
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences a backward pass; auto: all, or what fits
    batch_size_warmup_steps: int | None = None  # steps in which batches grow evenly to batch_size; None: no ramp
    initial_batch_size: int = 1  # ... from so many sequences
    seq_len_warmup_steps: int | None = None  # steps in which sequences double up to data.seq_len; None: no ramp
    initial_seq_len: int = 32  # ... from so many tokens; a batch holds the more of them, its tokens stay the same
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # what is computed twice to save memory
    label_smoothing: float = 0.0  # share of each target spread over the vocabulary, in training only
    z_loss: float = 0.0  # weight of the squared log of the softmax's denominator, in training only
    grad_clip: float | None = 1.0  # largest gradient norm; None: no clipping
    eval_every: int | None = None  # steps between evaluations; one is always made at the end ...
    eval_every_tokens: int | None = None  # ... or tokens, so that batch sizes compare; exactly one of the two
    eval_batches: int | None = None  # batches of 8 sequences an evaluation; None: the whole validation split
    log_every: int = 10  # steps between logged records
    checkpoint_every: int | None = None  # steps between checkpoints; None: at each evaluation
    keep_checkpoints: int = 2  # newest checkpoints kept, besides the best
    time_limit: float | None = None  # seconds after which the run saves and ends as interrupted; None: never
    patience: int | None = None  # stop after so many evaluations without improvement; None: never
    min_delta: float = 0.0  # a smaller gain does not count as improvement
    on_nonfinite: Literal["skip", "stop"] = "skip"  # a loss or gradient that is not finite
    compile: bool | Literal["auto"] = "auto"  # torch.compile the step; auto: where it pays within this run
    pad_vocab: bool | Literal["auto"] = "auto"  # logits at a multiple of 64 tokens, then cut; auto: 16 bits on GPUs
    diagnostics: bool = False  # record norms, update ratios and distributions of the weights, layer by layer
    diagnostics_every: int = 100  # ... so often in steps, and at the first and the last step
    profile: bool = False  # trace a few steps after warm-up, and tabulate their costliest operators
    sample_tokens: int = 120  # tokens of the sample shown at the end; 0: none

    def __post_init__(self) -> None:
        budgets = {
            name: value
            for name in ("max_steps", "max_epochs", "max_tokens")
            if (value := getattr(self, name)) is not None
        }
        require(
            len(budgets) == 1,
            "exactly one of trainer.max_steps, trainer.max_epochs and trainer.max_tokens must be set, got "
            + (", ".join(f"{name}={value}" for name, value in budgets.items()) or "none")
            + "; set the others to null",
        )
        require(
            (self.eval_every is None) != (self.eval_every_tokens is None),
            "exactly one of trainer.eval_every and trainer.eval_every_tokens must be set; set the other to null",
        )
        require_positive(
            "trainer.",
            **budgets,
            batch_size_warmup_steps=self.batch_size_warmup_steps,
            initial_batch_size=self.initial_batch_size,
            seq_len_warmup_steps=self.seq_len_warmup_steps,
            initial_seq_len=self.initial_seq_len,
            grad_clip=self.grad_clip,
            eval_every=self.eval_every,
            eval_every_tokens=self.eval_every_tokens,
            eval_batches=self.eval_batches,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            diagnostics_every=self.diagnostics_every,
            patience=self.patience,
            time_limit=self.time_limit,
            micro_batch_size=None if self.micro_batch_size == "auto" else self.micro_batch_size,
        )
        require_fraction("trainer.", label_smoothing=self.label_smoothing)
        require(self.z_loss >= 0, f"trainer.z_loss must not be negative, got {self.z_loss}")
        require(self.min_delta >= 0, f"trainer.min_delta must not be negative, got {self.min_delta}")
        require(self.sample_tokens >= 0, f"trainer.sample_tokens must not be negative, got {self.sample_tokens}")


@dataclass(kw_only=True)
class ParallelConfig:
    """The processors one run uses.

    `ddp` and `fsdp` are for the processes that torchrun starts: each trains on its share of every batch.
    """

    strategy: Literal["single", "ddp", "fsdp"] = "single"  # one process; the model in each; a part of it in each
    # CPU threads of each process. None: all cores, divided by the processes. auto: that, or what OMP_NUM_THREADS says,
    # or fewer where steps of a single run are clearly faster with fewer
    num_threads: int | Literal["auto"] | None = "auto"
    reshard_after_forward: bool = True  # fsdp: drop a block's gathered weights until its backward pass
    cpu_offload: bool = False  # fsdp on GPUs: parts of weights, gradients and optimizer state lie in main memory

    def __post_init__(self) -> None:
        require_positive("parallel.", num_threads=self.asked_threads)
        for name, default in (("reshard_after_forward", True), ("cpu_offload", False)):
            require(
                self.strategy == "fsdp" or getattr(self, name) == default,
                f"parallel.{name} is for parallel=fsdp, this run has parallel.strategy={self.strategy}",
            )

    @property
    def asked_threads(self) -> int | None:
        """The number that was asked for; None: none was."""
        return self.num_threads if isinstance(self.num_threads, int) else None
