"""What is wrong with a record, and what is then done: stop, or leave it out and count.

A broken container, such as a cut-off gzip, is no bad record: its readers raise DataError whatever the settings are.
"""

from __future__ import annotations

from collections.abc import Callable

from lmtrain.errors import DataError


class BadRecord(Exception):
    """A record that cannot be read.

    `reason` is one of few, to be counted by; the message follows the name of the place: "is not valid JSON: …".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BadRecords:
    """The policy of `data.on_bad_record`, which readers hand their bad records to."""

    def __init__(self, *, skipped: bool, on_skip: Callable[[str], None] | None = None) -> None:
        self.skipped = skipped
        self._on_skip = on_skip

    def __call__(self, place: str, bad: BadRecord) -> None:
        """Raise DataError that names the place, or tell `on_skip` the reason."""
        if not self.skipped:
            raise DataError(f"{place} {bad}; data.on_bad_record=skip leaves out what cannot be read") from bad
        if self._on_skip is not None:
            self._on_skip(bad.reason)
