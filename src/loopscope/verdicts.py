"""What a verdict is: a class, the sentence that says why, and the numbers behind it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["KINDS", "Kind", "Verdict"]


class Kind(StrEnum):
    """What a token's state tends to. The values are what a reader sees."""

    FIXED_POINT = "fixed point"
    """It approaches one point, or rests there: what is left of its motion is no more than rounding makes."""
    AT_FLOOR = "at floor"
    """It hovers about one point, and the motion that is left looks like amplified rounding. Nothing finer can be
    seen."""
    ORBIT = "orbit"
    """It returns to the same states, period after period."""
    SLIDER = "slider"
    """It moves on in one direction, in steps that do not add up to a limit."""
    BOUNDED = "bounded"
    """It keeps moving within bounds, far above the floor, and does not repeat itself."""
    DIVERGING = "diverging"
    """Its norm, or its distance to where it was, grows faster and faster, or it is no longer finite."""
    UNKNOWN = "unknown"
    """The trajectory does not tell. The reason says what is missing."""


KINDS = tuple(Kind)
"""In the order in which they are listed, coloured and numbered in a study."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one token's state tends to, with its evidence. Lengths are relative to the state's norm."""

    kind: Kind
    reason: str
    """One sentence that gives the deciding numbers."""
    method: str
    """`displacement` or `cosine`."""
    floor: float = math.nan
    """Estimated noise floor: the relative step between two states that differ by nothing but noise."""
    level: float = math.nan
    """Root mean square displacement within the window, the largest over the lags: how far it still moves."""
    period: float = math.nan
    """Of an orbit, or of a damped rotation, in recurrences."""
    amplitude: float = math.nan
    """Of an orbit: root mean square distance to its centre."""
    speed: float = math.nan
    """Of a slider: mean step per recurrence along its way, within the window."""
    rate: float = math.nan
    """Factor by which the distance to the limit shrinks, or that to the start grows, per recurrence; 1 neither."""
    p_value: float = math.nan
    """That noise alone would look as structured as this, corrected for how many shapes were tried."""
    unstable: tuple[str, ...] = ()
    """What changes the verdict: `window`, `horizon`, `seed`."""
    evidence: dict[str, float] = field(default_factory=dict)
    """Further numbers, by name."""
    displacement: tuple[float, ...] = ()
    """Root mean square displacement at lags 1, 2, ..."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: NaN becomes null."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
