"""The whole suite in order: what a change of the code moves first, what it hardly ever moves last.

`make bench` calls this. It says beforehand what will run and how long that takes on two quiet cores, goes on when a
target is missed or a script fails, and ends with 1 if one did. `--quick` runs each for seconds, to see that it works.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Script:
    """One of the suite."""

    name: str
    minutes: float  # on two quiet cores
    needs: tuple[str, ...] = ()  # packages
    reads_text: bool = False  # tinyshakespeare's


SUITE = [
    Script(name="step_time", minutes=16, needs=("transformers", "litgpt")),
    Script(name="step_overhead", minutes=6),
    Script(name="matrix_products", minutes=3),
    Script(name="startup", minutes=1),
    Script(name="time_to_loss", minutes=3, reads_text=True),
    Script(name="default_run", minutes=4),
    Script(name="generation", minutes=2),
    Script(name="generation_transformers", minutes=2, needs=("transformers",)),
    Script(name="sweep_throughput", minutes=12),
    Script(name="sweep_overhead", minutes=1),
    Script(name="checkpoint_stall", minutes=2),
    Script(name="data_reading", minutes=3),
    Script(name="data_preparation", minutes=9),
    Script(name="diagnostics_overhead", minutes=1),
    Script(name="comparing", minutes=2),
    Script(name="tracking", minutes=11, needs=("tensorboard", "wandb")),
    Script(name="tracking_outage", minutes=9),
]


def missing(script: Script, text: Path | None) -> str:
    """Why a script cannot run here; empty if it can."""
    packages = [package for package in script.needs if find_spec(package) is None]
    if packages:
        return f"{', '.join(packages)} not installed: make bench-setup"
    return 'no text: ARGS="--text PATH/TO/input.txt"' if script.reads_text and text is None else ""


def main() -> int:
    command_line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command_line.add_argument("--quick", action="store_true", help="each for seconds: judges nothing, writes nothing")
    command_line.add_argument("--text", type=Path, help="tinyshakespeare's input.txt, for those that read it")
    command_line.add_argument("--only", nargs="+", metavar="NAME", help="these scripts of the suite")
    arguments = command_line.parse_args()
    chosen = [script for script in SUITE if not arguments.only or script.name in arguments.only]
    left_out = {script.name: reason for script in chosen if (reason := missing(script, arguments.text))}
    chosen = [script for script in chosen if script.name not in left_out]
    for script in chosen:
        print(f"{script.name:26}" + ("seconds" if arguments.quick else f"{script.minutes:3.0f} min"))
    for name, reason in left_out.items():
        print(f"{name:26}left out: {reason}")
    if not arguments.quick:
        print(f"{'together':26}{sum(script.minutes for script in chosen):3.0f} min")
    failed = []
    for script in chosen:
        print(f"\n== {script.name}", flush=True)
        words = [str(arguments.text)] if script.reads_text else []
        words += ["--quick"] if arguments.quick else []
        began = time.perf_counter()
        status = subprocess.run([sys.executable, str(HERE / f"{script.name}.py"), *words]).returncode
        print(f"== {script.name}: {time.perf_counter() - began:.0f} s, exit status {status}", flush=True)
        failed += [script.name] if status else []
    print(f"\nmissed or failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
