"""Disks that are full: one that is made believe, after so many operations, and a real one."""

from __future__ import annotations

import errno
import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine


class FullDisk:
    """From the operation `full_at` on, whatever would take room below `folder` fails; counts the operations before."""

    def __init__(self, folder: Path, full_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._full_at = str(folder), full_at
        self.operations = 0
        self.failed = ""  # the operation that failed first
        self._open = io.open
        monkeypatch.setattr(io, "open", self.open)
        for name in ("mkdir", "rename", "replace", "fsync"):
            monkeypatch.setattr(os, name, self._counted(name))

    def take_room(self, operation: str) -> None:
        """Count an operation, or raise ENOSPC."""
        if self.operations >= self._full_at:
            self.failed = self.failed or operation
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.operations += 1

    def _counted(self, name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(first: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(first, int) or str(first).startswith(self._folder):
                self.take_room(name)
            return function(first, *arguments, **options)

        return call

    def open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        """The builtin one; of files below the folder, creating them and every write to the disk is an operation."""
        if not isinstance(file, str | Path) or not str(file).startswith(self._folder) or not set(mode) & set("wax+"):
            return self._open(file, mode, *arguments, **options)
        self.take_room("open")
        raw = _File(self, str(file), mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")


class _File(io.FileIO):
    def __init__(self, disk: FullDisk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk

    def write(self, content: Any, /) -> int:
        self._disk.take_room("write")
        return super().write(content) or 0


def on_a_small_disk(folder: Path, kilobytes: int, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script beside a folder `disk` of so many kilobytes, mounted for it; skip where that is not allowed."""
    (folder / "disk").mkdir(exist_ok=True)
    space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs disk"
    try:
        subprocess.run([*space, mount], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    return subprocess.run(
        [*space, f"{mount}\n{script}"],
        cwd=folder,
        env=CommandLine(folder).environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
