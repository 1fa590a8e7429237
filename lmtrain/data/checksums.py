"""Sums of the files of a cache entry, by blocks, so that checking them takes the same time however large they are."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 1 << 22
CHECKED_BLOCKS = 32
"""Of each file, the first and the last among them; a smaller file is checked whole."""


def of_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and block sums (XXH3, 64 bits) of files, by name."""
    return {
        path.name: {"size": path.stat().st_size, "sums": [_sum(block) for block in _blocks(path)]} for path in paths
    }


def verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check sizes, and blocks: all of a small file, others among them at each call. Raises OSError or ValueError."""
    for name, noted in files.items():
        path = folder / name
        if path.stat().st_size != noted["size"]:
            raise ValueError(f"{name} has not {noted['size']} bytes")
        sums = noted["sums"]
        with path.open("rb") as file:
            for number in _chosen(len(sums)):
                file.seek(number * BLOCK_BYTES)
                if _sum(file.read(BLOCK_BYTES)) != sums[number]:
                    raise ValueError(f"{name} has changed at byte {number * BLOCK_BYTES} or after")


def _chosen(count: int) -> list[int]:
    if count <= CHECKED_BLOCKS:
        return list(range(count))
    between = random.SystemRandom().sample(range(1, count - 1), CHECKED_BLOCKS - 2)  # not what a run's seed draws from
    return [0, *sorted(between), count - 1]


def _blocks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _sum(block: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(block)
