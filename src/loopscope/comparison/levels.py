"""How far curves are apart in level, and how a model's passes move away from the one it was trained for."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from loopscope.comparison.curves import StageCurves, correlated, relative_depth
from loopscope.comparison.null import varies

__all__ = ["drift", "level_difference", "own_similarity"]


def level_difference(
    curves: Float64[np.ndarray, "measure point"], reference: Float64[np.ndarray, "measure reference_point"], grid: int
) -> Float64[np.ndarray, " measure"]:
    """Root mean square difference on the common grid, over the root mean square of the reference.

    A correlation is blind to level and scale: two curves of the same shape may lie a factor of ten apart.
    """
    where = np.linspace(0, 100, grid)
    here, there = (
        np.stack([np.interp(where, relative_depth(rows.shape[1]), row) for row in rows]) for rows in (curves, reference)
    )
    return _over(here - there, there)


def drift(curves: StageCurves) -> Float64[np.ndarray, "measure recurrence"]:
    """Root mean square difference of each pass through the block from the pass at `home`, over the root mean square of
    that."""
    home = curves.block[:, curves.home, None]
    return _over(curves.block - home, home)


def own_similarity(curves: StageCurves) -> Float64[np.ndarray, "measure recurrence"]:
    """Pearson correlation of each pass through the block with the pass at `home`.

    They are the same layers, so that it takes no grid and no null. NaN where a curve does not vary.
    """
    block = correlated(curves.block)
    centred = block - block.mean(axis=2, keepdims=True)
    home = centred[:, curves.home, None]
    known = varies(block) & varies(block[:, curves.home, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (centred * home).sum(axis=2) / (np.linalg.norm(centred, axis=2) * np.linalg.norm(home, axis=2))
    return np.where(known, found, np.nan)


def _over(
    difference: Float64[np.ndarray, "*rest point"], reference: Float64[np.ndarray, "*other point"]
) -> Float64[np.ndarray, "*rest"]:
    """Ratio of root mean squares along the last axis; for a reference of 0, 0 without a difference, else infinite."""
    apart, size = (np.sqrt((values**2).mean(axis=-1)) for values in (difference, reference))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(apart == 0, 0.0, apart / size)
