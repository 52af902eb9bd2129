"""Numbers that are counted or scaled before they are drawn."""

from __future__ import annotations

import numpy as np
import xarray
from jaxtyping import Float64
from numpy.typing import NDArray

from loopscope.answers.exits import final_from

__all__ = ["final_shares", "per_row", "stable_share"]


def per_row(shown: xarray.Dataset, name: str) -> xarray.DataArray:
    """A Frobenius distance of attention maps over sqrt(T), so that prompts of different length compare."""
    return shown[name] / np.sqrt(shown["token_count"])


def stable_share(stable_from: xarray.DataArray, counts: NDArray[np.int64]) -> Float64[np.ndarray, "layer count"]:
    """Share of a layer's (head, prompt) pairs that are stable after so many recurrences, from `head_stable_from`."""
    settled = [(stable_from < count).where(np.isfinite(stable_from), other=False) for count in counts]
    shares = [one.mean([dim for dim in one.dims if dim != "layer"]).values for one in settled]
    return np.stack(shares, axis=-1).astype(np.float64)


def final_shares(top: xarray.DataArray) -> tuple[Float64[np.ndarray, " readout"], Float64[np.ndarray, " readout"]]:
    """Of all tokens, the share whose most probable next token is the last readout's at each readout, and the share that
    keeps it from there; from `token_top1`."""
    rows = top.transpose("readout_recurrence", "prompt", "token").values
    there = rows[-1] >= 0
    place = final_from(rows)[there]
    agrees = np.array([(row == rows[-1])[there].mean() for row in rows])
    return agrees, np.array([(place <= index).mean() for index in range(len(rows))])
