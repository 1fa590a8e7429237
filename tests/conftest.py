"""What all tests share: one thread, a small corpus, and the program as a user starts it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import CommandLine


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> Iterator[None]:
    """One thread: on tensors this small, more only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 400 lines of simple sentences, 13 kB."""
    words = random.Random(0).choices("the cat sat on a mat and dogs ran".split(), k=400 * 8)  # noqa: SIM905
    path = tmp_path_factory.mktemp("corpus") / "input.txt"
    path.write_text("".join(" ".join(words[start : start + 8]) + "\n" for start in range(0, len(words), 8)))
    return path


@pytest.fixture
def lmtrain(tmp_path: Path) -> CommandLine:
    """The program, in an empty working folder."""
    return CommandLine(tmp_path)
