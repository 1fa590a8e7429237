"""`python -m lmtrain`: from the words on the command line to a run, a sweep or a command, and its exit status.

Only light modules are imported here, so that help and wrong requests answer at once.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
from pathlib import Path

import hydra
from omegaconf import DictConfig

from lmtrain.config import compose
from lmtrain.config.explain import COMPOSITION_ERRORS, explain
from lmtrain.config.saved import PRIMARY_CONFIG, SAVED_CONFIG
from lmtrain.errors import Interrupted, LmtrainError, RunError, RunFolderError
from lmtrain.origin import Origin
from lmtrain.run_dir import RunDir

TRUSTED_TARGETS = ("lmtrain.*", "hydra.*", "hydra_plugins.*", "optuna.*", "logging.*")
"""What a config's `_target_` may name; Hydra refuses anything else, also in a config file from a stranger."""


class _PastHydra(BaseException):
    """Carries an error out of a single run without Hydra announcing it in its own words."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def task(config: DictConfig) -> float:
    """One run, as Hydra calls it; returns the objective, which an Optuna sweeper minimises."""
    job = compose.current_job()
    try:
        return _run_job(config, job)
    except (LmtrainError, *COMPOSITION_ERRORS) as error:
        if job.sweep_dir is not None and not isinstance(error, Interrupted):
            raise  # the other runs of the multirun go on
        raise _PastHydra(error) from error
    finally:
        RunDir(job.run_dir).discard_if_unused()


def _run_job(config: DictConfig, job: compose.Job) -> float:
    settings = compose.parse_config(config)
    origin = Origin(
        changed=compose.changed_settings(config, job),
        overrides=job.overrides,
        sweep_dir=job.sweep_dir,
        files=compose.hydra_folder(config),
    )
    from lmtrain.run import run_experiment

    result = run_experiment(settings, job.run_dir, origin)
    if job.sweep_dir is None and result.status in ("diverged", "out_of_memory"):
        raise RunError(f"the run ended as {result.status}; its folder is {job.run_dir}")
    return math.inf if result.objective is None else result.objective


def main() -> None:
    """Run what the command line asks for and exit with the status of docs/commands.md."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    show_traceback = "HYDRA_FULL_ERROR" in os.environ
    # Hydra would print an error its own way and exit with 1; this makes it hand the error to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        try:
            compose.register()
            config_path, config_name = _primary_config(arguments)
            start = hydra.main(config_path=config_path, config_name=config_name, execution_whitelist=TRUSTED_TARGETS)
            start(task)()
        except _PastHydra as carrier:
            raise carrier.error from None
    except LmtrainError as error:
        return _fail(error, str(error), error.exit_status, show_traceback)
    except COMPOSITION_ERRORS as error:
        return _fail(error, explain(error), 2, show_traceback)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone; nothing may be written there at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _primary_config(arguments: list[str]) -> tuple[str | None, str]:
    """Folder and name of the config to start from: the shipped one, or that of the run `resume=RUN` names."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "resume" and value not in ("null", "auto", ""):
            run_dir = Path(value).expanduser().absolute()
            if not (run_dir / f"{SAVED_CONFIG}.yaml").is_file():
                raise RunFolderError(f"resume={value}: there is no run folder {value} (it would hold config.yaml)")
            return str(run_dir), SAVED_CONFIG
    return None, PRIMARY_CONFIG


def _fail(error: Exception, message: str, status: int, show_traceback: bool) -> int:
    if show_traceback:
        traceback.print_exception(error)
    print(f"lmtrain: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
