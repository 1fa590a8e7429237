"""What the settings of every group share: the mark of a value that must be given, and simple rules."""

from __future__ import annotations

import math
from typing import Any

from lmtrain.errors import ConfigError

REQUIRED: Any = "???"  # OmegaConf's mark for a value that must be given


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(group: str, **values: float | None) -> None:
    """Every given value must be greater than zero and finite; None means "not set" and passes."""
    for name, value in values.items():
        require(value is None or 0 < value < math.inf, f"{group}{name} must be positive, got {value}")


def require_fraction(group: str, **values: float) -> None:
    """Every value must lie in [0, 1)."""
    for name, value in values.items():
        require(0 <= value < 1, f"{group}{name} must be at least 0 and below 1, got {value}")
