"""Trajectories and the dtype of their model as they are given: turned into one tensor and a rounding, or refused with a
sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from loopscope.errors import ConfigError
from loopscope.models.inspection.facts import Dtype, dtype_name

_SIGNIFICAND_BITS: dict[Dtype, int] = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""With the implicit one."""
_FEW = 64
"""Tokens that the check of the axes looks at."""
_AT_ONCE = 256
"""Tokens that are looked through for what is not finite at a time."""
_FROM = 16
"""Entries along an axis from which on it could be the recurrences."""


def check_dtype(dtype: object) -> Dtype:
    """The name of a dtype, from its name or from torch's or numpy's object. Raises `ConfigError` for one of which
    nothing is known."""
    name = dtype_name(dtype)
    known: Dtype
    for known in get_args(Dtype):
        if name == known:
            return known
    raise ConfigError(f"dtype is what the model computed in, one of {', '.join(get_args(Dtype))}; got {dtype!r}.")


def known_dtype(dtype: object, otherwise: Dtype) -> Dtype:
    """The same, or another dtype where nothing is known of this one."""
    try:
        return check_dtype(dtype)
    except ConfigError:
        return otherwise


def stored_dtype(states: Tensor) -> str:
    """Of an array, as it was handed in."""
    return str(states.dtype).removeprefix("torch.")


def computed_dtype(states: Tensor) -> Dtype | None:
    """The narrower dtype that every number of float32 states is one of, as if they had been computed in it and stored
    wider; None where there is none, or too few numbers to tell."""
    if states.dtype != torch.float32 or states.numel() < _FROM**2:
        return None
    some = states.reshape(-1)[:: max(1, states.numel() // 2**20)]
    narrower: Dtype
    for narrower in ("bfloat16", "float16"):
        if torch.equal(some.to(getattr(torch, narrower)).to(some.dtype), some):
            return narrower if len(some.unique()) >= _FROM**2 else None
    return None


def rounding_step(dtype: Dtype) -> float:
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


def as_states(states: NDArray[Any] | Tensor | Sequence[Any]) -> Tensor:
    """(token, recurrence, width), from an array (recurrence, width) or (token, recurrence, width), or from a sequence
    of trajectories (recurrence, width) of one length.

    Raises `ConfigError` for another number of axes, other numbers than floating-point ones, trajectories of different
    lengths or widths, and arrays without entries.
    """
    if isinstance(states, list | tuple):
        states = _stacked([each if isinstance(each, Tensor) else np.asarray(each) for each in states])
    tensor = states if isinstance(states, Tensor) else _as_tensor(np.asarray(states))
    if not tensor.is_floating_point():
        raise ConfigError(
            f"States are floating-point numbers; the array holds {str(tensor.dtype).removeprefix('torch.')}."
        )
    if tensor.dim() not in (2, 3):
        raise ConfigError(
            "States have the axes (recurrence, width) or (token, recurrence, width); the array has the shape "
            f"{tuple(tensor.shape)}."
        )
    if tensor.numel() == 0:
        raise ConfigError(f"There are no states in the array: its shape is {tuple(tensor.shape)}.")
    return (tensor[None] if tensor.dim() == 2 else tensor).detach().cpu()


def finite_tokens(states: Float[Tensor, "token recurrence width"]) -> Bool[Tensor, " token"]:
    """Whose states are all finite."""
    found = []
    for some in states.split(_AT_ONCE):
        # What is not finite makes no finite sum, which is found fast; large numbers may do so too.
        finite = some.sum((1, 2)).isfinite()
        finite[~finite] = some[~finite].isfinite().all(-1).all(-1)
        found.append(finite)
    return torch.cat(found)


def trajectories_of(states: Float[Tensor, "token recurrence width"], rows: Int[Tensor, " row"]) -> Tensor:
    """Those of some tokens in ascending order, without a copy where they follow each other."""
    first, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
    return states[first:end] if end - first == len(rows) else states[rows]


def check_axes(states: Tensor) -> None:
    """Refuse states whose recurrences run along another axis, where that can be seen.

    A trajectory that settles takes ever smaller steps. If the array does that along another axis and nothing like it
    along the axis that should be the recurrences, its axes are in another order. Raises `ConfigError`.
    """
    tokens, recurrences, width = states.shape
    if _settles(states) is not False:
        return
    if tokens >= _FROM and _settles(states.transpose(0, 1)):
        order, right = "(recurrence, token, width)", "states.swapaxes(0, 1)"
    elif width >= _FROM and _settles(states.transpose(1, 2)):
        order, right = "(token, width, recurrence)", "states.swapaxes(1, 2)"
    else:
        return
    raise ConfigError(
        f"The array of shape {(tokens, recurrences, width)} should be (token, recurrence, width) but looks like "
        f"{order}: along that axis the states settle. Pass {right}, or check_order=False if it is right as it is."
    )


def _stacked(trajectories: list[Any]) -> Tensor:
    if not trajectories:
        raise ConfigError("There are no trajectories to judge: the sequence is empty.")
    shapes = sorted({tuple(each.shape) for each in trajectories})
    if len(shapes) > 1:
        raise ConfigError(
            f"All trajectories that are judged together have one shape (recurrence, width); there are {len(shapes)}, "
            f"such as {shapes[0]} and {shapes[-1]}. Judge those of one length together, or cut them to the shortest."
        )
    return torch.stack([each if isinstance(each, Tensor) else _as_tensor(each) for each in trajectories])


def _as_tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ConfigError(f"States are floating-point numbers of at most 64 bits; the array holds {array.dtype}.")
    # A copy, for arrays that are mapped read-only or of another byte order.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def _settles(states: Tensor) -> bool | None:
    """Whether the steps along axis 1 become small and ever smaller; False where they stay as large as the states, None
    in between."""
    few = states[:_FEW].double()
    size = few.shape[1]
    quarter = max(1, size // 4)
    norm = torch.linalg.vector_norm(few, dim=-1)[:, 1:].clamp_min(1e-300)
    steps = torch.linalg.vector_norm(few[:, 1:] - few[:, :-1], dim=-1) / norm
    early, late = steps[:, :quarter].median(), steps[:, -quarter:].median()
    if late > 0.5 and late > 0.5 * early:
        return False
    return True if late < 0.05 and late < early / 3 else None
