"""Reading a published config.json field by field, with a clear sentence for what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopscope.errors import CheckpointError

__all__ = ["Fields"]


class Fields:
    """Typed access to the fields of a family's config."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.config = config
        self.family = family

    def require(self, name: str, value: Any) -> None:
        """Refuse another value of a field, where it is there: it would be another model than the one implemented."""
        if name in self.config and self.config[name] != value:
            raise CheckpointError(
                f"config.json has {name} = {self.config[name]!r}; loopscope implements {self.family} with "
                f"{value!r} only, and "
                "loading it approximately would give wrong numbers."
            )

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"config.json: {name} must be a whole number, got {value!r}.")
        return value

    def number(self, name: str) -> float:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"config.json: {name} must be a number, got {value!r}.")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} must be true or false, got {value!r}.")
        return value

    def mapping(self, name: str) -> Fields:
        value = self._get(name)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {name} must be an object, got {value!r}.")
        return Fields(value, self.family)

    def _get(self, name: str, default: Any = None) -> Any:
        value = self.config.get(name, default)
        if value is None:
            raise CheckpointError(f"config.json lacks the field {name!r}, which a {self.family} checkpoint has.")
        return value
