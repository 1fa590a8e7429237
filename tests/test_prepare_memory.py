"""Large corpora of extreme shapes are prepared in little memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TEXT_BOUND = 350
"""Peak megabytes of the whole process with 50 to 60 MB of text; the program itself takes 200 of them."""

DOCUMENTS_BOUND = 600
"""The same with two million documents, each of which is remembered."""

SCRIPT = textwrap.dedent("""
    import resource, sys
    from lmtrain.config.schema import SentencePieceBpeConfig, TextConfig
    from lmtrain.data import build
    from lmtrain.data.prepare import prepare

    build.available_cores = lambda: 1
    path, document = sys.argv[1:]
    data = TextConfig(seq_len=8, path=path, document=document, cache_dir="cache")
    (source,) = prepare(data, SentencePieceBpeConfig(vocab_size=300)).sources
    assert source.built
    count = sum(len(split.documents) for split in source.splits.values())
    print(count, sum(split.num_bytes for split in source.splits.values()))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
""")


def one_line() -> Iterator[str]:
    for number in range(1_500_000):
        yield f"word {number} of the only line and "


def many_lines() -> Iterator[str]:
    for number in range(1_500_000):
        yield f"word {number} of one line among many\n"


def tiny_lines() -> Iterator[str]:
    for number in range(2_000_000):
        yield f"some {number:x}\n"


@pytest.mark.parametrize(
    ("text", "document", "num_documents", "bound"),
    [
        (one_line, "line", 2, TEXT_BOUND),
        (one_line, "file", 2, TEXT_BOUND),
        (many_lines, "file", 2, TEXT_BOUND),
        (tiny_lines, "line", 2_000_000, DOCUMENTS_BOUND),
    ],
)
def test_peak_memory(tmp_path: Path, text: object, document: str, num_documents: int, bound: int) -> None:
    assert callable(text)
    path = tmp_path / "text.txt"
    with path.open("w") as file:
        file.writelines(text())
    command = [sys.executable, "-c", SCRIPT, str(path), document]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    documents, num_bytes, peak = map(int, done.stdout.split())
    assert documents == num_documents, "of one document, the end validates"
    assert num_bytes == path.stat().st_size - (num_documents if document == "line" and num_documents > 2 else 0)
    assert peak >> 20 < bound
