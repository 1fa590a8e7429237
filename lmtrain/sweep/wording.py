"""Settings and numbers for people: short, and the same in every table, page and picture. Knows no studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Parameter → its last part, `weight_decay` for `optimizer.weight_decay`, where that is unique."""
    last = {name: name.lstrip("+").split("@")[0].rsplit(".", 1)[-1] for name in names}
    uses = Counter(last.values())
    return {name: short if uses[short] == 1 else name for name, short in last.items()}


def short_value(value: object) -> str:
    """A parameter for people: numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_score(value: float) -> str:
    """An objective: four decimals, or whole if large."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def short_count(number: int) -> str:
    """`2,048`, `102k`, `1.5M`."""
    if number < 10_000:
        return f"{number:,}"
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:,.1f}M"
