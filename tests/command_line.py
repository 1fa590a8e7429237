"""The program as a user starts it: `python -m lmtrain` in a process of its own, in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A model of some 7,000 parameters; add data.path and a budget.
TINY = (
    *("data=text", "data.seq_len=16", "tokenizer=byte", "batch_size=4", "parallel.num_threads=1", "tracking=none"),
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "trainer.sample_tokens=20"),
)

FORKS = """
# Runs `python -m lmtrain` once for every case, each in a fork of this process, which has done the imports.
import json, os, runpy, sys, traceback
import lmtrain.run, lmtrain.sweep.confirm, lmtrain.sweep.report, lmtrain.sweep.dry_run
from lmtrain.config import compose

compose.register()
for number, (folder, words) in enumerate(json.load(sys.stdin)):
    if (child := os.fork()) == 0:
        os.chdir(folder)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = ["lmtrain", *words]
        status = 1
        try:
            runpy.run_module("lmtrain", run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class CommandLine:
    """Starts the program in `folder`, with the cache in `folder/cache`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def environment(self, **extra: str) -> dict[str, str]:
        """That of this process without what steers the program, with what keeps it inside `folder`."""
        foreign = ("MLFLOW_", "WANDB_", "HYDRA_", "LMTRAIN_", "COMP_", "COLUMNS")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        own = {"LMTRAIN_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return inherited | own | {"MLFLOW_DISABLE_TELEMETRY": "true"} | extra

    def start(self, *words: str, **extra: str) -> subprocess.Popen[str]:
        """Start it and return at once; `extra` is added to the environment."""
        return subprocess.Popen(
            [sys.executable, "-m", "lmtrain", *words],
            cwd=self.folder,
            env=self.environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, status: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end, which must be `status`."""
        with self.start(*words, **extra) as process:
            out, err = process.communicate(timeout=300)
        assert process.returncode == status, f"status {process.returncode}, not {status}\n{out}\n{err}"
        return subprocess.CompletedProcess(words, status, out, err)

    def fork(self, cases: Sequence[tuple[str, Sequence[str]]]) -> list[int]:
        """Run it once for each folder and words, quickly: the imports are made once. Returns the exit statuses.

        What it prints in FOLDER is in FOLDER.out and FOLDER.err; each folder has a cache of its own.
        """
        done = subprocess.run(
            [sys.executable, "-c", FORKS],
            input=json.dumps(cases),
            cwd=self.folder,
            env=self.environment(LMTRAIN_CACHE="cache"),
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        return [int(status) for status in done.stdout.split()]


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and sha256 of everything below a folder, by path inside it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, hashlib.sha256(content).hexdigest())
    return found
