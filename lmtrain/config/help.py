"""What `--help` prints. Hydra's own way to it describes itself first, which takes as long as all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lmtrain.config.compose import config_dir, group_options, primary_config, register
from lmtrain.config.schema import SCHEMAS


def help_text(overrides: Sequence[str], *, folder: str | None = None, name: str | None = None) -> str:
    """Commands, groups, and the settings that these words compose to.

    `folder` and `name` are those of `--config-dir` and `--config-name`. Raises what `compose_config` raises.
    """
    register()
    own_folder, own_name = primary_config(overrides)
    with initialize_config_dir(str(Path(folder).absolute()) if folder else own_folder or str(config_dir())):
        settings = OmegaConf.to_yaml(compose(name or own_name, list(overrides)))
    groups = "\n".join(
        f"  {group:<11} {', '.join(options)}" for group in [*SCHEMAS, "experiment"] if (options := group_options(group))
    )
    return f"""\
Train a transformer language model from scratch; find by sweeps which settings are best.

  python -m lmtrain                                  train with the defaults
  python -m lmtrain model=small precision=bf16       choose options of groups
  python -m lmtrain --multirun lr=1e-3,3e-3          a grid of runs, compared at the end
  python -m lmtrain --multirun sweep=lr_dropout_batch   an Optuna study
  python -m lmtrain resume=RUN trainer.max_steps=N   continue a run folder
  python -m lmtrain --cfg job                        show the settings, run nothing
  python -m lmtrain plan [key=value ...]             parameters, arithmetic, memory, microbatch; trains nothing
  python -m lmtrain generate RUN [--chat]            text from a trained model, or a conversation with it
  python -m lmtrain evaluate RUN [data=...]          loss, perplexity, bits per byte on any text; BLEU of pairs
  python -m lmtrain export RUN --to FOLDER           a folder for transformers, or with --format mlflow to serve
  python -m lmtrain models save RUN --name NAME      keep a model; list, show, verify and delete those kept
  python -m lmtrain verify-resume [key=value ...]    prove that a killed run resumes to the bit, here
  python -m lmtrain data inspect [RUN] [--step N]    look at the text, or at that of one step
  python -m lmtrain data clean-cache                 delete prepared text

Groups (group=option)

{groups}

Settings (key=value, group.key=value)

{settings}
Flags of Hydra: --hydra-help. Shell completion: eval "$(lmtrain -sc install=bash)"
"""
