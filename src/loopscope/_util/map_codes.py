"""How a study holds attention maps: one byte an entry, on a scale of square roots.

The square root spends the 254 steps where attention maps have their detail. A stored value differs from the true one
p by at most `sqrt(p) / 254 + 4e-6`: 0.004 at 1, 0.0004 at 0.01.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HIGHEST = 254
"""Stands for a probability of 1."""
UNKNOWN = 255
"""Stands for nothing: beyond the prompt's end, attention that cannot be seen, or a state that is not finite."""


def decode_maps(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The variable `attention_map` of a study as probabilities, `(code / 254)^2`, of any shape; 255 becomes NaN."""
    known = np.where(codes == UNKNOWN, np.nan, codes).astype(np.float32)
    return np.asarray(np.square(known / np.float32(HIGHEST)))
