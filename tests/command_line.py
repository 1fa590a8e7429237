"""The program as a user starts it: `python -m lmtrain` in a process of its own, in a folder of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A model of some 7,000 parameters; add data.path and a budget.
TINY = (
    *("data=text", "data.seq_len=16", "tokenizer=byte", "batch_size=4", "parallel.num_threads=1", "tracking=none"),
    *("model.d_model=16", "model.num_layers=1", "model.num_heads=2", "trainer.sample_tokens=20"),
)


class CommandLine:
    """Starts the program in `folder`, with the cache in `folder/cache`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def environment(self, **extra: str) -> dict[str, str]:
        """That of this process without what steers the program, with what keeps it inside `folder`."""
        foreign = ("MLFLOW_", "HYDRA_", "LMTRAIN_", "COMP_", "COLUMNS")
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


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and sha256 of everything below a folder, by path inside it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, hashlib.sha256(content).hexdigest())
    return found
