"""What rounding alone does to a state, by number type."""

from __future__ import annotations

import math
from typing import Literal, get_args

from loopscope.errors import ConfigError

__all__ = ["StateDtype", "check_dtype", "known_dtype", "rounding_step"]

StateDtype = Literal["float64", "float32", "float16", "bfloat16"]

_SIGNIFICAND_BITS: dict[str, int] = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""With the implicit one."""


_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


def check_dtype(dtype: object) -> StateDtype:
    """The name of a number type, from its name or from torch's or numpy's object. Raises `ConfigError` for one of which
    nothing is known."""
    name = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
    name = _SHORT.get(name, name)
    known: StateDtype
    for known in get_args(StateDtype):
        if name == known:
            return known
    raise ConfigError(
        f"dtype is the number type that the model ran in, one of {', '.join(get_args(StateDtype))}; got {dtype!r}."
    )


def known_dtype(dtype: object, otherwise: StateDtype) -> StateDtype:
    """The same, or another number type where nothing is known of this one."""
    try:
        return check_dtype(dtype)
    except ConfigError:
        return otherwise


def rounding_step(dtype: StateDtype) -> float:
    """The relative step between two states that differ by one rounding each and by nothing else.

    Rounding to nearest makes an error that is uniform within half a unit in the last place, whose standard deviation is
    2^-(p-1) / sqrt(12) for a significand of p bits in [1, 2). Over significands that are spread evenly on a logarithmic
    scale, as those of a state are, the root mean square relative error is that times sqrt(3 / (8 log 2)). Two such
    errors differ by sqrt(2) times as much.

    The value for float32 is 3.6e-8, for float16 2.9e-4, for bfloat16 2.3e-3. A recurrence rounds many times and
    amplifies what it rounded, so a real model's floor lies above, often by an order of magnitude.
    """
    unit = 2.0 ** (1 - _SIGNIFICAND_BITS[dtype])
    return math.sqrt(2) * unit / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2)))
