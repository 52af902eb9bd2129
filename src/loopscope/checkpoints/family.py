"""A family of checkpoints: how to recognise it, read its config, and find each of our parameters in its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from loopscope.architecture import Architecture
from loopscope.checkpoints import huginn, native
from loopscope.checkpoints.parts import Part

__all__ = ["FAMILIES", "Family", "Part"]

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Everything that is particular to one published format."""

    name: str
    recognises: Callable[[Config, Collection[str]], bool]
    """From config.json and the tensors' names."""
    architecture: Callable[[Config], Architecture]
    """Raises `CheckpointError` or `ConfigError` for any setting that the native model does not implement."""
    parts: Callable[[Architecture], Mapping[str, Part]]
    """Where each of our parameters lies."""
    unused: re.Pattern[str] = field(default=re.compile(r"(?!)"))
    """Names of tensors that may be there and are computed rather than read."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that may be there, and must then equal another one (a tied head)."""


FAMILIES: tuple[Family, ...] = (
    Family(
        name="loopscope",
        recognises=native.recognises,
        architecture=native.architecture,
        parts=native.parts,
    ),
    Family(
        name="huginn",
        recognises=huginn.recognises,
        architecture=huginn.architecture,
        parts=huginn.parts,
        unused=huginn.UNUSED,
        copies=huginn.COPIES,
    ),
)
