"""What a process of a pool does in tests of places; a module of its own, which such a process imports quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lmtrain.places import Places


def what_it_sees(places: Places, meeting: Path, number: int) -> tuple[int, str | None]:
    """Take a place, wait until all others have come, and come again later, as a worker makes several runs."""
    places.take()
    (meeting / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(meeting.iterdir())) < places.number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    Places.of_this_machine(places.number).take()
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")
