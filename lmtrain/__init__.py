"""Train transformer language models from scratch, and find by sweeps which settings are best.

The names below are the Python API, for notebooks and scripts: docs/api.md. Each is imported when it is first asked for,
so that importing the package takes no time.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmtrain.api import run_experiment
    from lmtrain.config.words import compose
    from lmtrain.inference.trained import load_model
    from lmtrain.reading import read_run
    from lmtrain.sweep.reading import read_study

__all__ = ["compose", "load_model", "read_run", "read_study", "run_experiment"]

_HOMES = {
    "compose": "lmtrain.config.words",
    "run_experiment": "lmtrain.api",
    "load_model": "lmtrain.inference.trained",
    "read_run": "lmtrain.reading",
    "read_study": "lmtrain.sweep.reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():
        # In a notebook without widgets, of Optuna's progress bar, which we do not draw.
        warnings.filterwarnings("ignore", "IProgress not found")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
