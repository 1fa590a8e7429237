"""Settings of the optimizers."""

from __future__ import annotations

from dataclasses import dataclass

from lmtrain.config.schema.rules import require, require_fraction, require_positive


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
