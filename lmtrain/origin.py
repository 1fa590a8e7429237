"""Where a run comes from: what was asked for, and the multirun it belongs to. Plain values, no Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a run came about."""

    changed: Mapping[str, Any] = field(default_factory=dict)  # group choices and settings that are not the default
    overrides: tuple[str, ...] = ()  # words of the command line, or chosen by a sweeper
    sweep_dir: Path | None = None  # folder of the multirun
    tags: Mapping[str, str] = field(default_factory=dict)  # what trackers shall show besides
    files: Mapping[str, str] = field(default_factory=dict)  # further texts for the run folder, by path inside
