"""Something to train on, made on the spot: how long a step takes does not depend on what is read."""

from __future__ import annotations

import random
import string
from pathlib import Path

import numpy as np


def write_text(path: Path) -> Path:
    """A text of 65 characters, as many as the Shakespeare one has."""
    letters = random.Random(0).choices((string.ascii_letters + string.punctuation)[:65], k=200_000)
    path.write_text("".join(letters), encoding="utf-8")
    return path


def write_ids(path: Path, vocab_size: int, num_tokens: int = 200_000) -> Path:
    """Token ids, drawn evenly, as a NumPy array that can be mapped into memory."""
    np.save(path, np.random.default_rng(0).integers(vocab_size, size=num_tokens, dtype=np.uint16))
    return path
