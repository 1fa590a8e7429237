"""Models that are kept: numbered versions of a name, in a folder or in an MLflow registry.

Owns what an entry is, how it appears, and that it stays as it was. Trains nothing and opens no model: that is for
`inference/`, which is given the run folder of an entry.
"""

from __future__ import annotations

from lmtrain.store.opening import ModelStore, find_run, open_store

__all__ = ["ModelStore", "find_run", "open_store"]
