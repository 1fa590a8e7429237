"""`python -m lmtrain`: from the words on the command line to a run, a sweep or a command, and its exit status.

Only light modules are imported here, so that help and wrong requests answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import os
import sys
import traceback
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from lmtrain.commands import COMMANDS, load_command
from lmtrain.config import compose
from lmtrain.config.explain import COMPOSITION_ERRORS, REQUEST_ERRORS, PastHydra, explain
from lmtrain.config.help import help_text
from lmtrain.config.saved import SAVED_CONFIG
from lmtrain.distributed.placement import Placement, find_placement
from lmtrain.errors import ConfigError, Interrupted, LmtrainError, RunError
from lmtrain.places import Places
from lmtrain.run_dir import RunDir

log = logging.getLogger(__name__)

TRUSTED_TARGETS = ("lmtrain.*", "hydra.*", "hydra_plugins.*", "optuna.*", "logging.*")
"""What a config's `_target_` may name; Hydra refuses anything else, also in a config file from a stranger."""

DRY_RUN = "--dry-run"


def task(config: DictConfig) -> float:
    """One run, as Hydra calls it; returns the objective, which an Optuna sweeper minimises."""
    job = compose.current_job()
    try:
        if job.moved_from is not None:
            os.chdir(job.moved_from)
            raise ConfigError("hydra.job.chdir=true is not supported: paths are relative to the folder you are in")
        return _run_job(config, job)
    except (LmtrainError, *COMPOSITION_ERRORS) as error:
        if job.sweep_dir is not None and not isinstance(error, Interrupted):
            raise  # the other runs of the multirun go on
        raise PastHydra(error) from error
    finally:
        RunDir(job.run_dir).discard_if_unused()


def _run_job(config: DictConfig, job: compose.Job) -> float:
    settings = compose.parse_config(config)
    if settings.resume not in (None, "auto") and not settings.force:
        RunDir(job.run_dir).require_no_trial()
    if job.sweep_dir is None and settings.sweep.dry_run:
        raise ConfigError(f"{DRY_RUN} tells what a sweep would run: add --multirun; --cfg job shows a single run")
    if job.sweep_dir is None and any(word.lstrip("+").startswith(("sweep=", "sweep.")) for word in job.overrides):
        log.warning("this makes one run: what sweep says is for --multirun")
    if settings.tracking.mlflow:
        from lmtrain.tracking.mlflow.process import mlflow_process

        with contextlib.suppress(OSError):  # the tracker says it, and the run goes on without
            mlflow_process()  # makes itself ready while torch is imported and the text prepared
    from lmtrain.run import run_experiment
    from lmtrain.sweep.grid import run_in_grid

    places = Places.of_this_machine(job.processes)
    run = run_experiment if job.sweep_dir is None else functools.partial(run_in_grid, places=places)
    try:
        result = run(settings, job.run_dir, compose.origin_of(config, job))
    except LmtrainError:
        raise
    except Exception as error:
        traceback.print_exc()  # here it still is whole, whichever launcher started this process
        raise RunError(f"the run failed: {type(error).__name__}: {error}") from error
    if job.sweep_dir is None and result.status in ("diverged", "out_of_memory"):
        raise RunError(f"the run ended as {result.status}; its folder is {job.run_dir}")
    return math.inf if result.objective is None else result.objective


def main() -> None:
    """Run what the command line asks for and exit with the status of docs/commands.md."""
    if sys.stdout is None:  # closed by the shell, `>&-`
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    placement = find_placement()
    status = _run(sys.argv[1:]) if placement.leads else _take_part(placement)
    if placement.leads and placement.size > 1:
        _dismiss_the_others(status)
    sys.exit(status)


def _take_part(placement: Placement) -> int:
    from lmtrain.taking_part import take_part

    try:
        take_part()
    except Exception as error:
        if not isinstance(error, LmtrainError):
            traceback.print_exc()
        print(f"lmtrain: process {placement.rank} of {placement.size}: {error}", file=sys.stderr)
        return 1
    return 0


def _dismiss_the_others(status: int) -> None:
    """They wait for runs; where there was none, torchrun ends them after a status that is not 0."""
    from lmtrain.distributed.team import join_team

    if status == 0 or join_team.cache_info().currsize:
        join_team().dismiss()


def _run(arguments: list[str]) -> int:
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    # Hydra would print an error its own way and exit with 1; this makes it hand the error to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        try:
            if arguments and arguments[0] in COMMANDS:
                return load_command(arguments[0])(arguments[1:])
            if DRY_RUN in arguments:  # Hydra knows no such flag
                arguments = [*(word for word in arguments if word != DRY_RUN), "sweep.dry_run=true"]
                sys.argv[1:] = arguments
            words = _parse(arguments)
            if words.help:
                print(help_text(words.overrides, folder=words.config_dir, name=words.config_name))
                return 0
            import lmtrain.sweep.sweeper  # noqa: F401 (tells Hydra our configs and our sweeper)

            config_path, config_name = compose.primary_config(words.overrides)
            if words.multirun and config_name == SAVED_CONFIG:
                raise ConfigError(
                    "resume=RUN continues one run in place; a multirun over its settings is --multirun "
                    "--config-dir RUN --config-name config, a multirun goes on with resume=auto sweep.name=NAME"
                )
            compose.refuse_groups(words.overrides, saved=SAVED_CONFIG in (config_name, words.config_name))
            start = hydra.main(config_path=config_path, config_name=config_name, execution_whitelist=TRUSTED_TARGETS)
            start(task)()
        except PastHydra as carrier:
            raise carrier.error from None
    except LmtrainError as error:
        return _fail(error, str(error), error.exit_status, show_traceback)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone; nothing may be written there at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except REQUEST_ERRORS as error:  # what goes wrong in a run arrives as LmtrainError
        return _fail(error, explain(error), 2, show_traceback)
    except Exception:  # a bug of ours
        traceback.print_exc()
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """The words as Hydra will parse them. Raises ConfigError where its parser would print its whole usage."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; --hydra-help lists the flags")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(arguments)


def _fail(error: Exception, message: str, status: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exception(error)
    print(f"lmtrain: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
