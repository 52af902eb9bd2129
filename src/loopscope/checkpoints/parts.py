"""Where one of our parameters lies in a stored tensor."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start:stop` of the tensor `name`, which must have the given shape."""

    name: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None
    """None for all rows."""

    @property
    def rows(self) -> tuple[int, int]:
        return self.start, self.shape[0] if self.stop is None else self.stop
