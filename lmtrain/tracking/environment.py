"""Where a run happens: versions, hardware, and the state of the code.

Only describes. Does not choose a device, and imports no library to learn its version.
"""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "lmtrain",
    "torch",
    "numpy",
    "hydra-core",
    "omegaconf",
    "optuna",
    "mlflow",
    "datasets",
    "sentencepiece",
    "safetensors",
)
MAX_DIFF_BYTES = 1_000_000
_GIT_TIMEOUT = 5.0  # seconds; a folder on a sleeping network disk must not hold up a run


@dataclass(frozen=True, kw_only=True)
class GitState:
    """The code a run was started from."""

    commit: str  # full hash
    branch: str  # "HEAD" when detached
    dirty: bool  # tracked files differ from the commit
    diff: str  # against the commit, staged changes included; cut at MAX_DIFF_BYTES


def describe_environment() -> dict[str, Any]:
    """Versions and hardware as plain JSON values. GPUs are named only when torch is already imported."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name)) is not None},
        "cpu": _cpu_name(),
        "cpu_cores": _usable_cores(),
        "memory_gib": _memory_gib(),
        "gpus": _gpu_names(),
    }


def describe_origin() -> dict[str, str]:
    """Who runs what, where, from which code: user, host, program; in a checkout git.commit, git.branch, git.dirty."""
    program = Path(sys.argv[0])
    module = f"python -m {program.parent.name}"
    origin = {"host": platform.node(), "program": module if program.name == "__main__.py" else str(program)}
    with suppress(KeyError, OSError):  # a container may run under a user id without a name
        origin["user"] = getpass.getuser()
    if (state := git_state(Path.cwd())) is not None:
        dirty = str(state.dirty).lower()
        origin |= {"git.commit": state.commit, "git.branch": state.branch, "git.dirty": dirty}
    return origin


def git_state(folder: Path) -> GitState | None:
    """The state of the checkout that `folder` lies in; None outside one, without git or without a commit."""
    try:
        commit, branch = _git(folder, "rev-parse", "HEAD", "--abbrev-ref", "HEAD").split()
        diff = _git(folder, "diff", "HEAD", "--no-ext-diff", "--no-color")
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return GitState(commit=commit, branch=branch, dirty=bool(diff), diff=_cut(diff))


def _git(folder: Path, *arguments: str) -> str:
    # --no-optional-locks: a run must not get in the way of the user's own git commands.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    output = subprocess.run(command, capture_output=True, check=True, timeout=_GIT_TIMEOUT).stdout
    return output.decode(errors="replace")


def _cut(diff: str) -> str:
    content = diff.encode()
    if len(content) <= MAX_DIFF_BYTES:
        return diff
    return content[:MAX_DIFF_BYTES].decode(errors="ignore") + "\n[cut: the diff is longer than this]\n"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores this process may use, which a container or a job scheduler can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not every system tells
        return None


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
