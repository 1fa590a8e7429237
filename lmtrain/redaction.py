"""Passwords in addresses, kept out of what is shown and written."""

from __future__ import annotations

import re


def redact(text: str) -> str:
    """The text with `***` for the password of every address in it: `://user:password@` and `password=...`."""
    without_users = re.sub(r"(://[^:/@\s]*):[^@/\s]*@", r"\1:***@", text)
    return re.sub(r"([?&;]password=)[^&;\s'\"]*", r"\1***", without_users)
