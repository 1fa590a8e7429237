"""A trained model in use: opened from a run folder, text in and text out, conversations.

Trains nothing. Writes models for other programs, in their formats.
"""

from __future__ import annotations

from lmtrain.inference.chat import Chat
from lmtrain.inference.trained import TrainedModel, load_model

__all__ = ["Chat", "TrainedModel", "load_model"]
