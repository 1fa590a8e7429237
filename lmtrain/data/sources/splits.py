"""Which split a file belongs to, told by the names of files and folders as the `datasets` library does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from lmtrain.data.prepared import SPLITS, SplitName

KEYWORDS: Mapping[SplitName, frozenset[str]] = {
    "train": frozenset({"train", "training"}),
    "val": frozenset({"validation", "valid", "dev", "val"}),
    "test": frozenset({"test", "testing", "eval", "evaluation"}),
}


def words_of(name: str) -> set[str]:
    """`{train, de, gz}` for `train-00.de.gz`."""
    return set(re.split(r"[-._ 0-9]+", name))


def by_name(paths: Sequence[PurePath]) -> dict[SplitName, list[int]]:
    """Numbers of the paths of each split, told by folders or else by file names; none if nothing says train.

    The paths are relative to the folder that was named: what it is called itself says nothing.
    """
    for named in (lambda path: path.parts[:-1], lambda path: (path.name,)):
        found: dict[SplitName, list[int]] = {}
        for number, path in enumerate(paths):
            words = set().union(*map(words_of, named(path)))
            if split := next((split for split in SPLITS if words & KEYWORDS[split]), None):
                found.setdefault(split, []).append(number)
        if "train" in found:
            return {split: found[split] for split in SPLITS if split in found}
    return {}
