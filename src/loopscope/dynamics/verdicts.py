"""What a verdict is: a kind, the sentence that says why, and the numbers behind it; and the files that hold verdicts on
trajectories of other tools."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from loopscope._util.cards import card
from loopscope._util.files import write_atomically
from loopscope._util.reading import is_there
from loopscope.errors import StudyError

_VERDICTS = "verdicts.jsonl"
_MANIFEST = "manifest.json"
_OWN = (_VERDICTS, _MANIFEST, "report.html", ".lock")


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

    @property
    def settles(self) -> bool:
        """It comes to rest, as far as the arithmetic can show."""
        return self in (Kind.FIXED_POINT, Kind.AT_FLOOR)

    @property
    def moves(self) -> bool:
        """It is seen to go on moving."""
        return not self.settles and self is not Kind.UNKNOWN

    @property
    def code(self) -> int:
        """Its place in `KINDS`, by which a study numbers verdicts."""
        return KINDS.index(self)

    @property
    def letter(self) -> str:
        """In tables and maps that have no room for the name."""
        return "?" if self is Kind.UNKNOWN else self[0].upper()


KINDS = tuple(Kind)
"""In the order in which they are listed, coloured and numbered in a study."""
SETTLED_CODES = tuple(kind.code for kind in KINDS if kind.settles)
"""Of those that settle."""
MOVING_CODES = tuple(kind.code for kind in KINDS if kind.moves)
"""Of those that go on moving."""


VERDICT_NUMBERS = ("level", "floor", "period", "amplitude", "speed", "rate", "p_value")
"""Fields of a `Verdict` that a study keeps, as `verdict_<name>`."""


class Doubt(StrEnum):
    """Why a trajectory does not tell, by the displacement method."""

    SLOWING = "Its steps shrink too nearly like 1/t to tell whether they add up to a limit."
    LOUD = "Rounding may move it as far: only a finer dtype tells whether that is noise or chaos."
    AMPLIFIED = "It follows a shape, but rounding that a slow mode amplifies would seem to as well."
    RIVALS = "A steady drift and an approach to a point explain it about as well."
    WANDERS = "It wanders: its displacement still grows at long lags, in no direction of its own."
    SHAPELESS = "It moves in no shape, and yet a run that differs by rounding stayed near: chaos only if that is slow."
    REMEMBERED = "It moves, but the last two thirds rest: it may be noise that a slow mode remembers."
    FEW_TURNS = "It turns, but too few times to tell whether it comes back to the same states again and again."
    SLIGHT = "Its turns become smaller, but too little to tell whether they end at a point or on an orbit."
    BRIEF = "It seems to approach a point, but in so few recurrences that the last two thirds of them do not show it."


DOUBTS = tuple(Doubt)
"""In the order in which studies number them."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Verdict:
    """What one token's state tends to, with its evidence. Lengths are relative to the state's norm."""

    kind: Kind
    reason: str
    """One sentence that gives the deciding numbers."""
    method: str
    """`displacement` or `cosine`."""
    doubt: Doubt | None = None
    """Why the displacement method cannot tell."""
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
    """What changes the verdict, such as a shorter `window`; or may, where no twin was run: `noise`, of motion that may
    be rounding which a slow mode remembers, or small and smooth."""
    evidence: dict[str, float] = field(default_factory=dict)
    """Further numbers, by name."""
    displacement: tuple[float, ...] = ()
    """Root mean square displacement at lags 1, 2, ..."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: NaN becomes null."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def __repr__(self) -> str:
        changes = f", changed by {' and '.join(self.unstable)}" if self.unstable else ""
        return f"<{self.kind}{changes}: {self.reason}>"

    def _repr_html_(self) -> str:
        numbers = {name: getattr(self, name) for name in VERDICT_NUMBERS}
        shown = {name.replace("_", " "): f"{value:.3g}" for name, value in numbers.items() if math.isfinite(value)}
        title = f"by the {self.method} method" + (
            f", changed by {' and '.join(self.unstable)}" if self.unstable else ""
        )
        return card(title, str(self.kind), self.reason, shown)


@dataclass(frozen=True, kw_only=True)
class JudgedTrajectory:
    """One token of one file."""

    file: str
    array: str
    """Name within the file; empty for a .npy file."""
    token: int
    recurrences: int
    verdict: Verdict
    path: tuple[tuple[float, float], ...] = ()
    """Its way through the tail in the plane of its two leading principal components, relative to the norm; kept for
    some."""

    @property
    def label(self) -> str:
        inside = f" {self.array}" if self.array else ""
        return f"{Path(self.file).name}{inside} [{self.token}]"


@dataclass(frozen=True, kw_only=True)
class JudgedFiles:
    """All tokens of some files, and how they were judged."""

    trajectories: list[JudgedTrajectory]
    manifest: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write verdicts.jsonl, a line a token, and manifest.json, each whole or not at all.

        Raises `StudyError` for a folder of something else, `StorageError`.
        """
        folder = Path(folder)
        check_folder(folder)
        lines = [
            {
                "file": each.file,
                "array": each.array,
                "token": each.token,
                "recurrences": each.recurrences,
                **each.verdict.to_dict(),
            }
            for each in self.trajectories
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(folder / _VERDICTS, text.encode())
        write_atomically(folder / _MANIFEST, (json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n").encode())


def check_folder(folder: Path) -> None:
    """Raises `StudyError` for a folder that holds anything but verdicts, which may be replaced."""
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OWN) if folder.is_dir() else []
    if others or (is_there(folder / _MANIFEST) and not is_there(folder / _VERDICTS)):
        found = others[0] if others else _MANIFEST
        raise StudyError(f"{folder} already holds other files ({found}); choose a new or empty folder for --out.")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
