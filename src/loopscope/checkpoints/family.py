"""A family of checkpoints: how to recognise it, read its config, and find each of our parameters in its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loopscope.architecture import Architecture
from loopscope.checkpoints.parts import Part

__all__ = ["ROTATION_TABLES", "Config", "Family"]

Config = Mapping[str, Any]

ROTATION_TABLES = re.compile(r"(.+\.)?(freqs_cis|rotary_emb\.(inv_freq|cos_cached|sin_cached))")
"""Buffers that some files hold, under any module; ours are computed from the config."""


@dataclass(frozen=True)
class Family:
    """Everything that is particular to one published format.

    A checkpoint belongs to the family whose `model_types` has its config's `model_type` and whose `recognises` knows
    its tensors: either alone may lie.
    """

    name: str
    model_types: tuple[str, ...]
    """What config.json says; several families may share one."""
    recognises: Callable[[Collection[str]], bool]
    """From the names of the tensors."""
    architecture: Callable[[Config], Architecture]
    """Raises `CheckpointError` or `ConfigError` for any setting that the native model does not implement."""
    parts: Callable[[Architecture, Collection[str]], Mapping[str, Part]]
    """Where each of our parameters lies, given the names of the tensors."""
    unused: re.Pattern[str] = ROTATION_TABLES
    """Names of tensors that may be there and are computed rather than read."""
    tied_head: str | None = None
    """A tensor that may be there where head and embedding are tied, and must then equal the embedding."""
