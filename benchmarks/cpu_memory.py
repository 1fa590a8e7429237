"""The memory of training on a CPU: what `lmtrain plan` says of a run, and what the run takes.

Each setting is planned, and trained for three steps with an evaluation and a checkpoint, in processes of their own.
Measured is the largest resident size of the process, from its start to its end, as Linux tells it. The text is made on
the spot, of bytes or of token ids of a large vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import Figure, parser, publish
from texts import write_ids, write_text

MAX_DEVIATION = 10.0  # percent
# Not the largest resident size of `getrusage`, which begins with that of the process that started this one.
TRAIN = """
import runpy, sys
from pathlib import Path
try:
    runpy.run_module("lmtrain", run_name="__main__", alter_sys=True)
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print("peak", next(line for line in lines if line.startswith("VmHWM")).split()[1], file=sys.stderr)
"""
SHARED = (
    *("model.d_model=256", "model.num_layers=6", "model.num_heads=4", "data.seq_len=256", "batch_size=12"),
    *("tracking=none", "parallel.num_threads=1", "trainer.compile=false", "trainer.sample_tokens=0", "precision=fp32"),
    *("trainer.max_steps=3", "trainer.eval_every=3", "trainer.eval_batches=1", "device=cpu"),
)
TEXT = ("data=text", "data.path=text.txt", "tokenizer=byte")
IDS = ("data=tokens", "data.path=ids.npy", "tokenizer=ids", "tokenizer.vocab_size=16000")
LLAMA = ("model.d_model=512", "model.num_heads=8", "model.num_kv_heads=4", "model.activation=swiglu")
GPT = ("model.norm=layernorm", "model.bias=true", "model.position=learned", "model.activation=gelu_tanh")
SETTINGS: dict[str, tuple[str, ...]] = {
    "muon": TEXT,
    "adamw": (*TEXT, "optimizer=adamw", "model.num_layers=8"),
    "microbatches of 6": (*TEXT, "trainer.micro_batch_size=6", "batch_size=24"),
    "checkpointing full": (*TEXT, "trainer.activation_checkpointing=full", "batch_size=40"),
    "checkpointing selective": (*TEXT, "trainer.activation_checkpointing=selective", "batch_size=24"),
    "dropout": (*TEXT, "dropout=0.1"),
    "Llama, adamw, full": (*TEXT, *LLAMA, "optimizer=adamw", "trainer.activation_checkpointing=full", "batch_size=16"),
    "Llama, muon, selective": (*TEXT, *LLAMA, "trainer.activation_checkpointing=selective"),
    "Llama, bf16, adamw": (*TEXT, *LLAMA, "optimizer=adamw", "precision=bf16", "batch_size=6"),
    "GPT-2, adamw": (*TEXT, *GPT, "optimizer=adamw"),
    "GPT-2, bf16, muon, full": (*TEXT, *GPT, "precision=bf16", "trainer.activation_checkpointing=full"),
    "16,000 tokens, adamw": (*IDS, "optimizer=adamw", "model.num_layers=3", "batch_size=6"),
}


def run(program: tuple[str, ...], words: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in a folder with a cache of its own; a failure ends the benchmark."""
    environment = os.environ | {"LMTRAIN_CACHE": str(folder / "cache")}
    ended = subprocess.run(
        [sys.executable, *program, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if ended.returncode:
        sys.exit(f"{' '.join(words)}: exit status {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return ended


def measure(words: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Bytes: predicted, with its parts at their largest, and measured."""
    trained = run(("-c", TRAIN), words, folder)  # first, so that what is prepared is known to the plan
    plan = json.loads(run(("-m", "lmtrain", "plan"), (*words, "--json"), folder).stdout)["memory"]
    return {
        "predicted": plan["peak"],
        "measured": 1024 * int(trained.stderr.rsplit("peak ", 1)[1].split()[0]),
        "parts": plan["parts"],
        "fullest": plan["fullest"],
    }


def main() -> int:
    arguments = parser(__doc__).parse_args()
    figures: list[Figure] = []
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_text(folder / "text.txt")
        write_ids(folder / "ids.npy", 16_000)
        for name, words in list(SETTINGS.items())[: 2 if arguments.quick else None]:
            words = (*SHARED, *words, f"hydra.run.dir={name.replace(' ', '_').replace(',', '')}")
            samples[name] = measure(words, folder)
            deviation = 100 * (samples[name]["predicted"] / samples[name]["measured"] - 1)
            print(f"{name}: {deviation:+.1f} %", flush=True)
            figures += [
                Figure(name=f"{name}: measured", value=samples[name]["measured"] / 2**20, unit="MiB"),
                Figure(name="  predicted, deviation", value=deviation, unit="%", at_least=0.0, at_most=MAX_DEVIATION),
            ]
    config = {"shared": SHARED, "settings": SETTINGS}
    return publish("cpu_memory", figures, config=config, samples=samples, quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
