"""How colours look to other eyes, and how far apart they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Machado, Oliveira, Fernandes: A Physiologically-based Model for Simulation of Color Vision Deficiency, IEEE
# Transactions on Visualization and Computer Graphics 15 (6), 2009: severity 1.0, on linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])  # D65


def lab(colour: str, deficiency: str | None = None) -> NDArray[np.float64]:
    """CIE L*a*b* of an sRGB colour, `#rrggbb`, as eyes with a deficiency have it."""
    encoded = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = linear if deficiency is None else np.array(DEFICIENCIES[deficiency]) @ linear
    ratio = _XYZ @ np.clip(seen, 0, 1) / _WHITE
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one: str, other: str, deficiency: str | None = None) -> float:
    """CIE 1976: 2.3 is just noticed side by side."""
    return float(np.linalg.norm(lab(one, deficiency) - lab(other, deficiency)))


def lightness_between(one: str, other: str) -> float:
    """What is left of a difference in grey, of 100 from black to white."""
    return float(abs(lab(one)[0] - lab(other)[0]))
