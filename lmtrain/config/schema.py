"""Every setting of an experiment: its type, its meaning, its default and the rules it must keep.

Plain dataclasses: no Hydra, no torch. Each option of a config group that has fields of its own is a class of its
own, so a key of another option is refused. `__post_init__` holds the rules inside one group,
`ExperimentConfig.__post_init__` those between groups. Nothing here is changed after construction; what follows
from other fields is a property.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lmtrain.errors import ConfigError

REQUIRED: Any = "???"  # OmegaConf's mark for a value that must be given


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(group: str, **values: float | None) -> None:
    """Every given value must be greater than zero; None means "not set" and passes."""
    for name, value in values.items():
        require(value is None or value > 0, f"{group}{name} must be positive, got {value}")


def require_fraction(group: str, **values: float) -> None:
    """Every value must lie in [0, 1)."""
    for name, value in values.items():
        require(0 <= value < 1, f"{group}{name} must be at least 0 and below 1, got {value}")


# ---------------------------------------------------------------------------------------------- model


@dataclass(kw_only=True)
class ModelConfig:
    """Base of every architecture."""


@dataclass(kw_only=True)
class DecoderConfig(ModelConfig):
    """A decoder-only transformer with pre-normalisation. The vocabulary comes from the tokenizer."""

    d_model: int = REQUIRED  # width of the residual stream
    num_layers: int = REQUIRED  # number of blocks
    num_heads: int = REQUIRED  # query heads
    num_kv_heads: int | None = None  # key and value heads; None: as many as num_heads
    d_ff: int | None = None  # hidden width of the feed-forward; None: 4 d_model, gated 8/3 d_model (to 64s)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # normalisation before each sublayer and at the end
    norm_eps: float = 1e-6  # added to the variance
    position: Literal["rotary", "learned"] = "rotary"  # how tokens know where they are
    rope_theta: float = 10000.0  # base of the rotary frequencies
    activation: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"  # of the feed-forward
    qk_norm: bool = False  # RMS-normalise queries and keys per head
    tie_embeddings: bool = True  # one matrix for input and output embedding
    init_std: float = 0.02  # standard deviation of every matrix at the start
    output_init: Literal["depth_scaled", "zero"] = "depth_scaled"  # matrices that write to the residual stream

    def __post_init__(self) -> None:
        require_positive(
            "model.",
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            d_ff=self.d_ff,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            init_std=self.init_std,
        )
        require(
            self.d_model % self.num_heads == 0,
            f"model.d_model ({self.d_model}) must be divisible by model.num_heads ({self.num_heads})",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads ({self.num_heads}) must be divisible by model.num_kv_heads ({self.kv_heads})",
        )
        require(
            self.position != "rotary" or self.head_dim % 2 == 0,
            f"model.position=rotary needs an even head width, got d_model / num_heads = {self.head_dim}",
        )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies two projections."""
        return self.activation in ("swiglu", "geglu")

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward; the default keeps gated and plain ones about equally large."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // 3 // 64) * 64 if self.gated else 4 * self.d_model


# ---------------------------------------------------------------------------------------------- data


@dataclass(kw_only=True)
class DataConfig:
    """What every data set has in common."""

    seq_len: int = REQUIRED  # tokens a sequence: the context the model is trained at
    val_fraction: float = 0.1  # share of the text kept for validation
    split: Literal["auto", "document", "tail"] = "auto"  # by whole documents, or the end of the text
    min_chars: int = 1  # shorter documents are left out
    max_documents: int | None = None  # use only the first so many; None: all
    cache_dir: str | None = None  # where prepared tokens are kept; None: the user's cache folder

    def __post_init__(self) -> None:
        require_positive("data.", seq_len=self.seq_len, max_documents=self.max_documents)
        require(self.min_chars >= 0, f"data.min_chars must not be negative, got {self.min_chars}")
        require(0 < self.val_fraction < 1, f"data.val_fraction must lie between 0 and 1, got {self.val_fraction}")


@dataclass(kw_only=True)
class PythonStdlibConfig(DataConfig):
    """The source files of this Python's standard library, one document a file."""


@dataclass(kw_only=True)
class TextConfig(DataConfig):
    """UTF-8 text files."""

    path: str = REQUIRED  # a file, a folder (every *.txt in it) or a glob
    document: Literal["file", "paragraph", "line"] = "file"  # what counts as one document


# ----------------------------------------------------------------------------------------- tokenizer


@dataclass(kw_only=True)
class TokenizerConfig:
    """Base of every tokenizer."""


@dataclass(kw_only=True)
class SentencePieceBpeConfig(TokenizerConfig):
    """Byte-pair encoding by SentencePiece, trained on the training documents."""

    vocab_size: int = REQUIRED  # pieces, the 256 bytes and special tokens included
    character_coverage: float = 0.9995  # share of characters with a piece; the rest are spelt in bytes
    sample_bytes: int = 20_000_000  # train on about this much text

    def __post_init__(self) -> None:
        require(
            self.vocab_size >= 300,
            f"tokenizer.vocab_size must be at least 300 (256 of them are bytes), got {self.vocab_size}",
        )
        require(
            0 < self.character_coverage <= 1,
            f"tokenizer.character_coverage must lie between 0 and 1, got {self.character_coverage}",
        )
        require_positive("tokenizer.", sample_bytes=self.sample_bytes)


@dataclass(kw_only=True)
class CharConfig(TokenizerConfig):
    """One token a character that occurs in the text."""


@dataclass(kw_only=True)
class ByteConfig(TokenizerConfig):
    """One token a byte of UTF-8."""


# ----------------------------------------------------------------------------------------- optimizer


@dataclass(kw_only=True)
class OptimizerConfig:
    """Base of every optimizer. The learning rate is the root key `lr`; weight decay acts on matrices only."""

    weight_decay: float = 0.1  # decoupled: a step shrinks matrices by lr * weight_decay, whatever the gradient

    def __post_init__(self) -> None:
        require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")


@dataclass(kw_only=True)
class MomentsConfig(OptimizerConfig):
    """Base of those that follow Adam: an average of the gradient over the root of an average of its square."""

    betas: tuple[float, float] = (0.9, 0.95)  # decay of the two averages
    eps: float = 1e-8  # added to the denominator

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_betas(self.betas)
        require_positive("optimizer.", eps=self.eps)


def _require_betas(betas: tuple[float, float]) -> None:
    require_fraction("optimizer.", **{f"betas[{i}]": beta for i, beta in enumerate(betas)})


@dataclass(kw_only=True)
class AdamWConfig(MomentsConfig):
    """AdamW for every parameter (Loshchilov and Hutter, arXiv:1711.05101)."""


@dataclass(kw_only=True)
class AdamConfig(MomentsConfig):
    """Adam for every parameter (Kingma and Ba, arXiv:1412.6980)."""

    weight_decay: float = 0.0  # not decoupled: weight_decay * weight is added to the gradient of matrices


@dataclass(kw_only=True)
class MuonConfig(MomentsConfig):
    """Muon for the matrices of the blocks, AdamW for the rest, at one learning rate (arXiv:2502.16982)."""

    momentum: float = 0.95  # decay of the gradient average
    nesterov: bool = True  # look one step of momentum ahead
    ns_steps: int = 5  # Newton–Schulz iterations

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("optimizer.", momentum=self.momentum)
        require_positive("optimizer.", ns_steps=self.ns_steps)


@dataclass(kw_only=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent, with momentum if it is not 0."""

    weight_decay: float = 0.0  # not decoupled: weight_decay * weight is added to the gradient of matrices
    momentum: float = 0.9  # share of the last step's direction that is kept
    nesterov: bool = False  # look one step of momentum ahead

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("optimizer.", momentum=self.momentum)
        require(not self.nesterov or self.momentum > 0, "optimizer.nesterov needs an optimizer.momentum above 0")


@dataclass(kw_only=True)
class LionConfig(OptimizerConfig):
    """Lion: the sign of an averaged gradient (Chen et al., arXiv:2302.06675)."""

    weight_decay: float = 1.0  # decoupled; the paper takes as many times more than for AdamW as lr is smaller
    betas: tuple[float, float] = (0.9, 0.99)  # share of the average in the direction, and decay of the average

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_betas(self.betas)


@dataclass(kw_only=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor: second moments by row and column, no first moment (Shazeer and Stern, arXiv:1804.04235).

    `lr` is relative: a step moves a tensor by about `lr` times the root mean square of its own values.
    """

    weight_decay: float = 0.0  # decoupled: a step shrinks matrices by lr * weight_decay
    beta2_decay: float = -0.8  # at step t the second moments decay by 1 - t ** beta2_decay
    clip_threshold: float = 1.0  # largest root mean square of an update, before it is scaled
    min_scale: float = 1e-3  # a tensor counts as at least this large, so that one of zeros moves

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta2_decay <= 0, f"optimizer.beta2_decay must not be positive, got {self.beta2_decay}")
        require(self.clip_threshold >= 1, f"optimizer.clip_threshold must be at least 1, got {self.clip_threshold}")
        require_positive("optimizer.", min_scale=self.min_scale)


# ------------------------------------------------------------------------------------------ schedule


@dataclass(kw_only=True)
class ScheduleConfig:
    """Base of every learning-rate schedule: a linear warm-up, then a shape of its own."""

    warmup_steps: int | None = None  # length of the warm-up in steps; None: by warmup_fraction
    warmup_fraction: float = 0.02  # ... or as a share of all steps

    def __post_init__(self) -> None:
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            f"schedule.warmup_steps must not be negative, got {self.warmup_steps}",
        )
        require_fraction("schedule.", warmup_fraction=self.warmup_fraction)


def _require_share(**values: float) -> None:
    for name, value in values.items():
        require(0 <= value <= 1, f"schedule.{name} must lie between 0 and 1, got {value}")


@dataclass(kw_only=True)
class DecayConfig(ScheduleConfig):
    """Base of the schedules that come down to a given rate at the end of the run."""

    final_lr_fraction: float = 0.0  # the rate just after the last step, as a share of `lr`

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(final_lr_fraction=self.final_lr_fraction)


@dataclass(kw_only=True)
class CosineConfig(DecayConfig):
    """Half a cosine from `lr` down to the final rate (Loshchilov and Hutter, arXiv:1608.03983)."""


@dataclass(kw_only=True)
class CosineRestartsConfig(DecayConfig):
    """Half a cosine from `lr` down to the final rate, again and again (arXiv:1608.03983)."""

    cycles: int = 4  # cosines from the warm-up to the end of the run
    cycle_mult: float = 1.0  # length of a cycle in lengths of the one before

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("schedule.", cycles=self.cycles, cycle_mult=self.cycle_mult)


@dataclass(kw_only=True)
class LinearConfig(DecayConfig):
    """A straight line from `lr` down to the final rate."""


@dataclass(kw_only=True)
class WarmupStableDecayConfig(DecayConfig):
    """Constant at `lr`, then a straight line down to the final rate (arXiv:2404.06395)."""

    decay_fraction: float = 0.4  # share of all steps spent going down

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(decay_fraction=self.decay_fraction)


@dataclass(kw_only=True)
class ConstantConfig(ScheduleConfig):
    """`lr` from the warm-up to the end."""


@dataclass(kw_only=True)
class InverseSqrtConfig(ScheduleConfig):
    """After the warm-up as one over the root of the step, so that it needs no end (arXiv:1706.03762)."""

    min_lr_fraction: float = 0.0  # never below this share of `lr`

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(min_lr_fraction=self.min_lr_fraction)


@dataclass(kw_only=True)
class PlateauConfig(ScheduleConfig):
    """`lr`, lowered each time the objective has not gained (by trainer.min_delta) for some evaluations."""

    factor: float = 0.5  # what the rate is multiplied by
    patience: int = 2  # evaluations without a gain before each time; trainer.patience ends the run
    min_lr_fraction: float = 0.01  # never below this share of `lr`

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.factor < 1, f"schedule.factor must lie between 0 and 1, got {self.factor}")
        require_positive("schedule.", patience=self.patience)
        _require_share(min_lr_fraction=self.min_lr_fraction)


# -------------------------------------------------------------------- precision, trainer, parallel


@dataclass(kw_only=True)
class PrecisionConfig:
    """The number format of the forward and backward pass; weights and optimizer state are always fp32."""

    format: Literal["auto", "fp32", "bf16", "fp16"] = REQUIRED


@dataclass(kw_only=True)
class TrainerConfig:
    """How long and how the run goes."""

    max_steps: int | None = None  # budget in optimizer steps ...
    max_epochs: float | None = None  # ... or passes over the training text
    max_tokens: int | None = None  # ... or tokens; exactly one of the three
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences a backward pass; auto: all that fit
    batch_size_warmup_steps: int | None = None  # steps in which batches grow evenly to batch_size; None: no ramp
    initial_batch_size: int = 1  # ... from so many sequences
    seq_len_warmup_steps: int | None = None  # steps in which sequences double up to data.seq_len; None: no ramp
    initial_seq_len: int = 32  # ... from so many tokens; a batch holds the more of them, its tokens stay the same
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # what is computed twice to save memory
    label_smoothing: float = 0.0  # share of each target spread over the vocabulary, in training only
    z_loss: float = 0.0  # weight of the squared log of the softmax's denominator, in training only
    grad_clip: float | None = 1.0  # largest gradient norm; None: no clipping
    eval_every: int = REQUIRED  # steps between evaluations; one is always made at the end
    eval_batches: int | None = None  # batches an evaluation; None: the whole validation split
    log_every: int = 10  # steps between logged records
    checkpoint_every: int | None = None  # steps between checkpoints; None: at each evaluation
    keep_checkpoints: int = 2  # newest checkpoints kept, besides the best
    time_limit: float | None = None  # seconds after which the run saves and ends as interrupted; None: never
    patience: int | None = None  # stop after so many evaluations without improvement; None: never
    min_delta: float = 0.0  # a smaller gain does not count as improvement
    on_nonfinite: Literal["skip", "stop"] = "skip"  # a loss or gradient that is not finite
    compile: bool = False  # torch.compile the model
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
        require_positive(
            "trainer.",
            **budgets,
            batch_size_warmup_steps=self.batch_size_warmup_steps,
            initial_batch_size=self.initial_batch_size,
            seq_len_warmup_steps=self.seq_len_warmup_steps,
            initial_seq_len=self.initial_seq_len,
            grad_clip=self.grad_clip,
            eval_every=self.eval_every,
            eval_batches=self.eval_batches,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
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
    """The processors one run uses."""

    num_threads: int | None = None  # CPU threads of this process; None: all cores

    def __post_init__(self) -> None:
        require_positive("parallel.", num_threads=self.num_threads)


# --------------------------------------------------------------------------------- tracking, sweep


@dataclass(kw_only=True)
class TrackingConfig:
    """Base of every tracker. `metrics.jsonl` is always written; a tracker mirrors it."""


@dataclass(kw_only=True)
class NoTrackingConfig(TrackingConfig):
    """No mirror."""


@dataclass(kw_only=True)
class MlflowConfig(TrackingConfig):
    """MLflow: a database file, or a server."""

    uri: str | None = None  # None: MLFLOW_TRACKING_URI if set, else sqlite:///mlflow.db in this folder
    experiment: str = "lmtrain"  # MLflow experiment the run goes to
    run_name: str | None = None  # None: the run folder's name
    close_timeout: float = 60.0  # seconds the end of a run waits for a slow server

    def __post_init__(self) -> None:
        require_positive("tracking.", close_timeout=self.close_timeout)


@dataclass(kw_only=True)
class SweepConfig:
    """The runs of one multirun."""

    name: str = REQUIRED  # folder under multirun/ and name of the MLflow parent run

    def __post_init__(self) -> None:
        require(bool(self.name.strip()), "sweep.name must not be empty")


# ---------------------------------------------------------------------------------------- experiment


@dataclass(kw_only=True)
class ExperimentConfig:
    """One run. The root keys live here only and are passed to whoever needs them."""

    model: ModelConfig = REQUIRED
    data: DataConfig = REQUIRED
    tokenizer: TokenizerConfig = REQUIRED
    optimizer: OptimizerConfig = REQUIRED
    schedule: ScheduleConfig = REQUIRED
    precision: PrecisionConfig = REQUIRED
    trainer: TrainerConfig = REQUIRED
    parallel: ParallelConfig = REQUIRED
    tracking: TrackingConfig = REQUIRED
    sweep: SweepConfig = REQUIRED

    lr: float = REQUIRED  # peak learning rate, for every optimizer
    dropout: float = REQUIRED  # embedding, attention and residual dropout
    batch_size: int = REQUIRED  # sequences an optimizer step
    seed: int = 0  # everything random in the run follows from it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    objective: Literal["val/loss", "val/perplexity", "val/bits_per_byte", "train/loss"] = "val/loss"
    """The metric that best, patience and sweeps minimise, as it stands at an evaluation."""
    resume: str | None = None  # null, auto, or a run folder to continue
    force: bool = False  # resume although settings or data differ from those of the run
    init_from: str | None = None  # run folder whose weights to start from

    def __post_init__(self) -> None:
        require_positive("", lr=self.lr, batch_size=self.batch_size)
        require_fraction("", dropout=self.dropout)
        require(0 <= self.seed < 2**63, f"seed must be at least 0 and below 2**63, got {self.seed}")
        micro = self.trainer.micro_batch_size
        require(
            micro == "auto" or micro <= self.batch_size,
            f"trainer.micro_batch_size ({micro}) must not exceed batch_size ({self.batch_size})",
        )
        if isinstance(self.schedule, PlateauConfig) and self.trainer.patience is not None:
            require(
                self.trainer.patience > self.schedule.patience,
                f"trainer.patience ({self.trainer.patience}) must be above schedule.patience "
                f"({self.schedule.patience}), or the run ends before its rate is lowered",
            )
        self._require_ramps()

    def _require_ramps(self) -> None:
        if self.trainer.batch_size_warmup_steps is not None:
            initial = self.trainer.initial_batch_size
            require(
                initial <= self.batch_size,
                f"trainer.initial_batch_size ({initial}) must not exceed batch_size ({self.batch_size})",
            )
        if self.trainer.seq_len_warmup_steps is not None:
            initial, full = self.trainer.initial_seq_len, self.data.seq_len
            require(
                full % initial == 0 and (full // initial).bit_count() == 1,
                f"data.seq_len ({full}) must be trainer.initial_seq_len ({initial}) times a power of two",
            )


# Group → name of its bare typed option (`model=_decoder`): what a YAML option names first in its defaults list.
SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"_decoder": DecoderConfig},
    "data": {"_python_stdlib": PythonStdlibConfig, "_text": TextConfig},
    "tokenizer": {"_sentencepiece_bpe": SentencePieceBpeConfig, "_char": CharConfig, "_byte": ByteConfig},
    "optimizer": {
        "_adamw": AdamWConfig,
        "_adam": AdamConfig,
        "_muon": MuonConfig,
        "_sgd": SGDConfig,
        "_lion": LionConfig,
        "_adafactor": AdafactorConfig,
    },
    "schedule": {
        "_cosine": CosineConfig,
        "_cosine_restarts": CosineRestartsConfig,
        "_linear": LinearConfig,
        "_wsd": WarmupStableDecayConfig,
        "_constant": ConstantConfig,
        "_inverse_sqrt": InverseSqrtConfig,
        "_plateau": PlateauConfig,
    },
    "precision": {"_precision": PrecisionConfig},
    "trainer": {"_trainer": TrainerConfig},
    "parallel": {"_parallel": ParallelConfig},
    "tracking": {"_none": NoTrackingConfig, "_mlflow": MlflowConfig},
    "sweep": {"_sweep": SweepConfig},
}
