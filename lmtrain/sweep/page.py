"""Pages that need nothing beside themselves: templates of this folder, filled, with pictures inside.

What a page says is its caller's; the look and the sorting of tables that all share are in `page.html.j2`.
"""

from __future__ import annotations

import base64
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any


def fill_page(template: str, **values: Any) -> str:
    """The text of a page; everything in `values` is escaped. Raises jinja2.UndefinedError for a value not given."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(lambda name: files("lmtrain.sweep").joinpath(name).read_text(encoding="utf-8")),
    )
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(written=written, **values)


def data_uri(path: Path) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
