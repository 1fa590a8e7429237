"""`lmtrain plan`: what a run or a sweep would take, before it is made.

  lmtrain plan [key=value ...]            parameters, arithmetic, memory by part, the microbatch that fits, time, energy
  lmtrain plan [key=value ...] --probe    ... time and memory corrected by short real steps, which take some seconds
  lmtrain plan lr=1e-3,3e-3 model=nano,tiny   a sweep, by the words of --multirun: a row for each shape, and the whole
  lmtrain plan sweep=lr_dropout_batch     ... of a study, the corners of its ranges
  lmtrain plan ... --json                 the same as one JSON object

The words are those of training. Trains nothing, prepares and writes nothing. Exit status 0 whether it fits or not: the
text says so, and `fits` of the JSON.
"""

from __future__ import annotations

import argparse
import json
import math

from lmtrain.commands import CommandParser
from lmtrain.config.compose import compose_config
from lmtrain.config.multirun import is_multirun
from lmtrain.errors import ConfigError
from lmtrain.machine import count_gpus
from lmtrain.planning.estimate import estimate
from lmtrain.planning.view import record, show


def main(arguments: list[str]) -> int:
    """Print the plan of a run or sweep; exit status 0. Raises LmtrainError for what could not be trained."""
    parser = CommandParser("plan", __doc__)
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, as for training")
    parser.add_argument("-m", "--multirun", action="store_true", help="of a sweep, also where no word tells")
    parser.add_argument("--probe", action="store_true", help="correct time and memory by short real steps")
    parser.add_argument("--devices", type=int, metavar="N", help="of parallel=ddp and fsdp; default: the GPUs here")
    parser.add_argument("--watts", type=float, help="what a device takes, for the energy")
    parser.add_argument("--json", action="store_true", help="one JSON object, for other programs")
    options = parser.parse_intermixed_args(arguments)
    if options.devices is not None and options.devices < 1:
        raise ConfigError(f"--devices must be at least 1, got {options.devices}")
    if options.watts is not None and not 0 < options.watts < math.inf:
        raise ConfigError(f"--watts must be positive, got {options.watts:g}")
    if options.multirun or is_multirun(options.words):
        if options.devices is not None:
            raise ConfigError("--devices is of one run: the runs of a sweep have a device each")
        return _plan_sweep(options)
    config = compose_config(options.words)
    devices = options.devices or (1 if config.parallel.strategy == "single" else max(1, count_gpus()))
    found = estimate(config, devices=devices, probing=options.probe, watts=options.watts)
    if options.json:
        print(json.dumps(record(found), indent=2))
    else:
        show(found)
    return 0


def _plan_sweep(options: argparse.Namespace) -> int:
    from lmtrain.sweep.request import estimate_sweep
    from lmtrain.sweep.sizing_view import record_sweep, show_sweep

    found = estimate_sweep(options.words, probing=options.probe, watts=options.watts)
    if options.json:
        print(json.dumps(record_sweep(found), indent=2))
    else:
        show_sweep(found)
    return 0
