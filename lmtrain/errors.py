"""The errors a user can cause or meet, and the exit status each one ends the program with.

A message states the rule, the value that broke it and what to do, in one or two lines: it is shown without a
traceback. `assert` is for our own invariants, never for these.
"""

from __future__ import annotations


class LmtrainError(Exception):
    """Base of every error that is shown to the user without a traceback."""

    exit_status = 1


class UsageError(LmtrainError):
    """The request was wrong: nothing was started and nothing was written."""

    exit_status = 2


class ConfigError(UsageError, ValueError):
    """A setting, or two settings together, cannot be used."""


class DataError(UsageError):
    """The text to train on is missing, unreadable or unsuitable."""


class RunFolderError(UsageError):
    """A run folder is missing, is not one, or holds something else than was asked for."""


class HardwareError(UsageError):
    """The machine cannot do what was asked (a device, a number format)."""


class NotEnoughMemoryError(HardwareError):
    """What was asked for cannot be trained in all the memory of the machine."""


class CheckpointError(UsageError):
    """A checkpoint cannot be used: it is missing, damaged or of another model."""


class NewerFormatError(CheckpointError):
    """A checkpoint of a later version of the program: sound, but not for us to read."""


class WeightsOnlyError(CheckpointError):
    """A checkpoint of a model that was exported: sound, but not to train on from where it was."""


class ModelStoreError(UsageError):
    """A model store, or a model in one, cannot be used: it is missing, damaged or refuses."""


class ModelNotFoundError(ModelStoreError):
    """A model store holds no such model."""


class RunError(LmtrainError):
    """The run was made and did not succeed."""


class TextChangedError(RunError):
    """The text is no longer the one that a study began with, so that its trials would not compare."""


class Interrupted(LmtrainError):
    """The run was asked to stop by a signal and has saved where it was."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_status = 128 + signal_number
