"""The memory that a plan says, against the resident memory of real training in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import CommandLine

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

SHAPE = (
    *("model.d_model=256", "model.num_layers=6", "model.num_heads=4", "data.seq_len=256", "batch_size=12"),
    *("tokenizer=byte", "tracking=none", "parallel.num_threads=1", "trainer.compile=false", "trainer.sample_tokens=0"),
    *("trainer.max_steps=3", "trainer.eval_every=3", "trainer.eval_batches=1", "precision=fp32"),
)

CONFIGS = {
    "muon": (),
    "adamw": ("optimizer=adamw", "model.num_layers=8"),
    "microbatches": ("trainer.micro_batch_size=3", "batch_size=24"),
    "checkpointing_full": ("trainer.activation_checkpointing=full", "batch_size=40"),
    "checkpointing_selective": ("trainer.activation_checkpointing=selective", "batch_size=24"),
    "packed_documents": ("data.batches=packed_documents", "data.document=line"),
    "dropout": ("dropout=0.1",),
    "wide": ("model.d_model=768", "model.num_layers=3", "optimizer=lion", "batch_size=4"),
    "sgd": ("optimizer=sgd", "model.activation=swiglu", "batch_size=16"),
    "adafactor": ("optimizer=adafactor", "model.d_model=512", "model.num_layers=4", "batch_size=6"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("name", CONFIGS)
def test_training_takes_no_more_than_its_plan_says(lmtrain: CommandLine, corpus: Path, name: str) -> None:
    words = [*SHAPE, f"data.path={corpus}", "data=text", *CONFIGS[name]]
    plan = json.loads(lmtrain("plan", *words, "--json").stdout)
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *words, "hydra.run.dir=run"],
        cwd=lmtrain.folder,
        env=lmtrain.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(done.stderr.split("peak ")[-1].split()[0])
    print(f"{name}: {plan['memory']['peak'] / peak - 1:+.1%} of {peak / 2**20:.0f} MiB")
    assert peak <= plan["memory"]["peak"] <= peak / 0.75
