"""The mirror to Weights & Biases: what is said to wandb, and nowhere else; it is imported with the first run.

wandb keeps what it sends in `RUN/wandb`, which every attempt writes anew from the metrics file. Offline, that is all
there is, for `wandb sync` later; a server takes of it the steps that it does not have.
"""

from __future__ import annotations

import configparser
import http.client
import logging
import netrc
import os
import shutil
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from lmtrain.config.schema import TrackingConfig
from lmtrain.errors import ConfigError
from lmtrain.run_dir import RunDir
from lmtrain.tracking.background import BackgroundTracker, Request, one_line
from lmtrain.tracking.metrics_file import PLACE, read_metrics
from lmtrain.tracking.run_info import RunEnding, RunInfo

if TYPE_CHECKING:
    from wandb import Run

FOLDER = "wandb"
Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}

ENVIRONMENT = {  # set unless the user did
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
}
ANSWER_TIMEOUT = 10.0  # seconds that a server may take to be there
INIT_TIMEOUT = 30.0  # seconds that it may take to begin a run
FINISH_TIMEOUT = 10.0  # seconds that the end of a run waits for a server to take the rest
MAX_TAG_CHARS = 64  # of wandb
EXIT_CODES = {"interrupted": 130}
log = logging.getLogger(__name__)


class WandbTracker(BackgroundTracker):
    """Mirrors one run to Weights & Biases in the background."""

    def __init__(self, config: TrackingConfig) -> None:
        """Raises ConfigError for an unknown WANDB_MODE, and for mode online if there is no key to log in with."""
        mode = wandb_mode(config)
        if mode == "online":
            _require_key()
        super().__init__(
            server="Weights & Biases",
            open_mirror=partial(WandbMirror, config, mode),
            is_transient=lambda error: False,
            close_timeout=config.close_timeout,
            remedy=f"; later, wandb sync RUN/{FOLDER}/* sends what is there",
        )


class WandbMirror:
    """A run that goes on, in Weights & Biases."""

    def __init__(self, config: TrackingConfig, mode: Mode, info: RunInfo, request: Request) -> None:
        self._folder = RunDir(info.folder)
        if (place := info.folder / FOLDER).exists():
            shutil.rmtree(place)
        place.mkdir()  # raises if it cannot be; wandb would go elsewhere
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with request.waiting() if mode == "online" else nullcontext():
            if mode == "online" and (problem := _why_away(address := _address())) is not None:
                later = f"wandb sync {self._folder}/{FOLDER}/* sends the run"
                log.warning("Weights & Biases at %s cannot be reached (%s); later, %s", address, problem, later)
                mode = "offline"
            self._run = _open_run(config, mode, info)
        self._step = self._run.step - 1  # the last that the server has
        if self._folder.metrics.exists():
            self.log(read_metrics(self._folder.metrics))

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        for record in records:
            step = int(record["step"])
            if step >= self._step:  # records of one step make one row, which is sent when the next begins
                self._step = step
                metrics = {key: record[key] for key in sorted(record.keys() - PLACE)}
                self._run.log({**metrics, "_timestamp": record["time"]}, step=step)

    def finish(self) -> None:
        ending = RunEnding.read(self._folder.path)
        self._run.summary.update({**ending.summary, "status": ending.status})
        self._run.finish(exit_code=0 if ending.succeeded else EXIT_CODES.get(ending.status, 1))


def _open_run(config: TrackingConfig, mode: Mode, info: RunInfo) -> Run:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_TIMEOUT,
        finish_timeout=min(FINISH_TIMEOUT, config.close_timeout),
        finish_timeout_raises=True,
        disable_code=True,  # nothing but what is told here
        disable_git=True,
        symlink=False,
        x_save_requirements=False,
        x_disable_machine_info=True,
        x_disable_stats=True,
    )
    return wandb.init(
        project=config.experiment,
        name=config.run_name or info.name,
        id=info.id,
        group=None if info.sweep is None else info.sweep.name,
        config={**info.params, "tags": dict(info.tags), "origin": dict(info.origin)},
        tags=[tag for key, value in info.tags.items() if len(tag := f"{key}:{value}") <= MAX_TAG_CHARS],
        dir=str(info.folder),
        mode=mode,
        resume="allow",
        reinit="create_new",  # a process that makes several runs may not have sent all of the one before
        settings=settings,
    )


def _why_away(address: str) -> str | None:
    """Why the server does not answer, or None if it does, whatever it says.

    wandb itself asks again for minutes, and keeps nothing of a run that it could not begin.
    """
    try:
        urllib.request.urlopen(address, timeout=ANSWER_TIMEOUT).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:  # wandb may know other certificates
        return None if isinstance(error.reason, ssl.SSLError) else one_line(error)
    except (OSError, http.client.HTTPException) as error:
        return one_line(error)
    return None


def wandb_mode(config: TrackingConfig) -> Mode:
    """Of the config, else of WANDB_MODE. Raises ConfigError for a mode that there is not."""
    mode = config.wandb_mode or os.environ.get("WANDB_MODE") or "online"
    if mode not in MODES:
        raise ConfigError(f"WANDB_MODE is '{mode}'; it must be one of {', '.join(MODES)}")
    return MODES[mode]


def _address() -> str:
    """Of the server: as the environment says, else as `wandb login --host` noted it, else the public one."""
    noted = configparser.RawConfigParser()
    with suppress(configparser.Error):
        noted.read(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    saved = noted.get("default", "base_url", fallback="https://api.wandb.ai")
    return os.environ.get("WANDB_BASE_URL") or saved


def _require_key() -> None:
    """Raise ConfigError if wandb would have to ask for a key. It is not imported for that, which takes its time."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    host = urlsplit(_address()).netloc
    try:
        known = netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None or known.authenticators(host) is None:
        raise ConfigError(
            f"Weights & Biases wants a key for {host}: run `wandb login`, or set WANDB_API_KEY; "
            "or add tracking.wandb_mode=offline"
        )
