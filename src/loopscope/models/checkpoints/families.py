"""The families that loopscope reads."""

from __future__ import annotations

from loopscope.models.checkpoints.family import Family
from loopscope.models.checkpoints.llama import LLAMA, MISTRAL, OLMO2, OURO, QWEN3
from loopscope.models.checkpoints.nanbeige import NANBEIGE
from loopscope.models.checkpoints.native import NATIVE
from loopscope.models.checkpoints.parcae import PARCAE
from loopscope.models.checkpoints.raven import HUGINN, RETROFIT_LLAMA, RETROFIT_OLMO

FAMILIES: tuple[Family, ...] = (
    NATIVE,
    HUGINN,
    RETROFIT_LLAMA,
    RETROFIT_OLMO,
    OURO,
    NANBEIGE,
    PARCAE,
    LLAMA,
    MISTRAL,
    OLMO2,
    QWEN3,
)
