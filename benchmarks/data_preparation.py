"""How fast text becomes tokens on disk, in how much memory, and how long a run waits for its first batch afterwards.

A corpus of 1 GB is made from the standard library's sources: documents of about 2 kB cut out at random, with one word
in fifty changed, so that new words go on appearing as they do in real text (the same words again would be too easy).
They are JSON lines; one file of text, which is one document; and the same file with a document a line, of 36 bytes in
the mean: some 28 million, which is what memory is spent on, and too many for the target of speed.
It is prepared by the command a user has, `lmtrain data inspect`, from an empty cache: reading, dividing, training the
tokenizer, tokenising, checksums. Memory is the sum over all processes of what is resident, looked at ten times a
second; pages that processes share count in each. Then the warm start is timed in this process: `prepare` and the first
batch of 1,024 tokens a sequence, imports left out.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil
from report import Figure, median_figure, parser, publish

from lmtrain.config.compose import compose_config
from lmtrain.data.prepare import prepare
from lmtrain.feeding import train_batches

MIN_SPEED, MAX_MEMORY, MAX_START = 8.0, 1.0, 0.3  # MB/s, GB, s
CHANGED_WORDS = 50  # one in so many
DOCUMENT_CHARS = 2000
TINY_DOCUMENTS = "a document a line"
TRIES = 7


def write_corpus(path: Path, num_bytes: int, *, lines: bool) -> int:
    """Write JSON lines, or plain lines of text; returns the bytes of text."""
    generator = random.Random(0)
    # A folder below a package keeps tests and other people's code apart.
    sources = [
        file.read_text(encoding="utf-8", errors="ignore") for file in sorted(Path(os.__file__).parent.glob("*.py"))
    ]
    text = "".join(sources)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            start = generator.randrange(len(text) - DOCUMENT_CHARS)
            words = re.split(r"(\w+)", text[start : start + DOCUMENT_CHARS])
            for place in range(1 + 2 * generator.randrange(CHANGED_WORDS), len(words), 2 * CHANGED_WORDS):
                words[place] = f"{words[place]}{generator.randrange(10**6)}"
            document = "".join(words)
            written += len(document.encode())
            file.write((document if lines else json.dumps({"text": document}, ensure_ascii=False)) + "\n")
    return written


def time_preparation(words: list[str]) -> tuple[float, float]:
    """Seconds of the whole command, and the most memory its processes held at once in GB."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lmtrain", "data", "inspect", "--samples", "0", *words]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _resident(process))
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(process.stdout.read())
    return seconds, peak / 1e9


def _resident(process: psutil.Process) -> int:
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def time_first_batch(words: list[str]) -> float:
    """Seconds until a run with prepared data has its first batch."""
    config = compose_config([*words, "data.seq_len=1024"])
    started = time.perf_counter()
    data = prepare(config.data, config.tokenizer)
    train_batches(config, data)[0]
    return time.perf_counter() - started


def main() -> int:
    command_line = parser(__doc__)
    command_line.add_argument("--gigabytes", type=float, default=1.0, help="of text (default 1)")
    arguments = command_line.parse_args()
    num_bytes = int(1e9 * (0.02 if arguments.quick else arguments.gigabytes))
    figures, samples, config = [], {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind, options, suffix in (
            ("JSON lines", ["data=jsonl"], ".jsonl"),
            ("one text", ["data=text"], ".txt"),
            (TINY_DOCUMENTS, ["data=text", "data.document=line"], ".txt"),
        ):
            path = folder / f"corpus{suffix}"
            size = write_corpus(path, num_bytes, lines=suffix == ".txt")
            words = [*options, f"data.path={path}", f"data.cache_dir={folder / 'cache'}", "tokenizer=sentencepiece_bpe"]
            seconds, memory = time_preparation(words)
            starts = [time_first_batch(words) for _ in range(TRIES)]
            samples[kind] = {"bytes": size, "seconds": seconds, "resident_gb": memory, "first_batch": starts}
            config[kind] = {key: value for key, value in asdict(compose_config(words).data).items() if key != "path"}
            figures += [
                Figure(
                    name=f"{kind}: text prepared",
                    value=size / 1e6 / seconds,
                    unit="MB/s",
                    at_least=None if kind == TINY_DOCUMENTS else MIN_SPEED,
                ),
                Figure(name=f"{kind}: resident memory", value=memory, unit="GB", at_most=MAX_MEMORY),
                median_figure(f"{kind}: first batch, prepared before", starts, unit="s", at_most=MAX_START),
            ]
            path.unlink()
    for one in config.values():
        one["cache_dir"] = None
    return publish("data_preparation", figures, config=config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
