"""`torch.compile` of a step: what it needs, where its code is kept, and whether it pays within a run.

The step calls what is compiled (`step.py`); when it is asked whether to compile is the session's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lmtrain.errors import HardwareError

log = logging.getLogger(__name__)

MIN_STEPS = 200
"""With fewer steps to go it is not even asked whether compiling pays."""

HOPED_SPEEDUP = {"cpu": 1.5, "cuda": 2.0}
"""What a step of an unknown shape might gain at best, in the mean over CPUs and GPUs seen: it is tried for no less."""

FIRST_COMPILE = {"cpu": (10.0, 3.0), "cuda": (15.0, 2.0)}
"""Seconds, and seconds a block, that code which is in no cache is taken to need before it was ever measured."""

FROM_CACHE = 0.35
"""Share of those that the same code takes out of the cache, before that was measured."""

WORTH_IT = 2.0
"""Seconds saved per second of compiling that are asked for: the estimates are rough."""

MIN_GAIN = 1.03
"""Compiled code that is less faster than this is within the noise of the probe, and not taken."""

PROBE_SECONDS = 0.1
"""A pass is timed until it has taken so long; twice at least."""


CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True, kw_only=True)
class Known:
    """What was measured of one shape on this machine."""

    speedup: float  # of forward and backward pass
    first: float  # seconds to compile it for the first time ...
    cached: float | None = None  # ... and out of the cache


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    """Whether to compile, and why."""

    compile: bool
    reason: str


class CompileRecords:
    """What is known of compiled steps, one file a shape, beside the compiled code."""

    def __init__(self, cache: Path, shape: dict[str, Any]) -> None:
        """`shape` holds all that the code and its speed depend on."""
        described = json.dumps(shape | {"torch": torch.__version__}, sort_keys=True, default=str)
        digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        self._path = cache / "compiled" / "known" / f"{digest}.json"

    def read(self) -> Known | None:
        try:
            return Known(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, known: Known) -> None:
        """Not being able to is no reason to stop."""
        draft = self._path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(asdict(known)), encoding="utf-8")
            draft.replace(self._path)


def missing_compiler(device: torch.device) -> str | None:
    """What `torch.compile` lacks on this machine, and the remedy; None: nothing."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type not in ("cpu", "cuda"):
        return f"compiled training is for CPUs and CUDA devices, this run is on {device.type}"
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}: install one, or name another by CXX=..."
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton, which writes code for GPUs, is not installed"
    return None


def require_compiler(device: torch.device) -> None:
    """Raise HardwareError if a step cannot be compiled here."""
    if (lacking := missing_compiler(device)) is not None:
        raise HardwareError(f"trainer.compile=true: {lacking}; or take trainer.compile=false")


def keep_compiled_code(cache: Path) -> None:
    """Share compiled code among all runs with this cache folder, unless the user has named another place for it."""
    import torch._dynamo.config as settings
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # PyTorch itself sets the variable, to its default, when it first asks for it.
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[CACHE_VARIABLE] = str(cache / "compiled")
    # Every model of another shape counts against the limit, in a process that makes many trials; beyond it PyTorch goes
    # on uncompiled, and a trial would differ from the same one made alone.
    settings.recompile_limit = settings.accumulated_recompile_limit = 4096


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Enter it around a compiled pass: without it, gradients of embeddings are added up in the order of the threads."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # which costs time and makes nothing repeatable here
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def seconds_a_pass(dry_pass: Callable[[], None]) -> float:
    """The least of a few."""
    least, began = float("inf"), time.perf_counter()
    for number in range(1000):
        started = time.perf_counter()
        dry_pass()
        now = time.perf_counter()
        least = min(least, now - started)
        if number and now - began >= PROBE_SECONDS:
            break
    return least


def choose_to_compile(
    *,
    dry_passes: Callable[[], None],
    compiled_passes: Callable[[], None],
    at_once: int = 1,
    passes: int,
    num_blocks: int,
    device: torch.device,
    records: CompileRecords,
) -> CompileChoice:
    """Whether compiled code saves more time than compiling takes, in the `passes` (of a microbatch) that are to come.

    What is known of the shape decides; where nothing is, and much could be saved, it is compiled once and timed.

    Args:
        dry_passes: makes passes that leave no trace, uncompiled: `at_once` of them.
        compiled_passes: the same, which compiles when it is called first.
    """
    known = records.read()
    eager = seconds_a_pass(dry_passes) / at_once
    cost, speedup, guessed = _expectation(known, device, num_blocks)
    saved = passes * eager * (1 - 1 / speedup)
    if speedup < MIN_GAIN or saved < WORTH_IT * cost:
        share = f"at best {speedup:.1f}× as fast" if guessed else f"{speedup:.2f}× as fast"
        return CompileChoice(
            compile=False, reason=f"no: {share}, it would save {max(saved, 0.0):.0f} s for {cost:.0f} s of compiling"
        )
    try:
        seconds, compiled = _compile_and_time(compiled_passes)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever breaks in a compiler is no reason not to train
        log.debug("compiling failed", exc_info=True)
        return CompileChoice(compile=False, reason=f"no: it failed ({_first_line(error)})")
    compiled /= at_once
    speedup = eager / compiled
    records.write(Known(speedup=speedup, first=known.first if known else seconds, cached=seconds if known else None))
    if speedup < MIN_GAIN:
        return CompileChoice(compile=False, reason=f"no: {speedup:.2f}× as fast")
    due = math.ceil(seconds / (eager - compiled))
    return CompileChoice(
        compile=True,
        reason=f"yes: {speedup:.2f}× as fast; {seconds:.0f} s to compile pay after {due:,} of {passes:,} passes",
    )


def _expectation(known: Known | None, device: torch.device, num_blocks: int) -> tuple[float, float, bool]:
    """Seconds to compile, how many times as fast it will be, and whether that is a guess."""
    base, per_block = FIRST_COMPILE[device.type]
    if known is None:
        return base + per_block * num_blocks, HOPED_SPEEDUP[device.type], True
    return known.cached or FROM_CACHE * known.first, known.speedup, False


def _compile_and_time(compiled_passes: Callable[[], None]) -> tuple[float, float]:
    """Seconds to compile, and of those passes."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled_passes()
    seconds = time.perf_counter() - began
    return seconds, seconds_a_pass(compiled_passes)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
