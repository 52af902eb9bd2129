"""The families that loopscope reads."""

from __future__ import annotations

from loopscope.checkpoints.family import Family
from loopscope.checkpoints.huginn import HUGINN
from loopscope.checkpoints.llama import LLAMA
from loopscope.checkpoints.mistral import MISTRAL
from loopscope.checkpoints.native import NATIVE
from loopscope.checkpoints.olmo2 import OLMO2
from loopscope.checkpoints.ouro import OURO
from loopscope.checkpoints.qwen3 import QWEN3
from loopscope.checkpoints.retrofit import RETROFIT_LLAMA, RETROFIT_OLMO

__all__ = ["FAMILIES"]

FAMILIES: tuple[Family, ...] = (
    NATIVE,
    HUGINN,
    RETROFIT_LLAMA,
    RETROFIT_OLMO,
    OURO,
    LLAMA,
    MISTRAL,
    OLMO2,
    QWEN3,
)
