"""The measures of a stage of inference (method: stages of inference), each as one number per visit and prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import xarray

from loopscope._util.sinks import SINK_THRESHOLD


@dataclass(frozen=True)
class StageQuantity:
    """One measure of a visit."""

    anchor: str
    """Of its figures."""
    name: str
    """In a sentence."""
    variable: str
    """Of the study, from which it is computed."""
    of_prompt: Callable[[xarray.Dataset], xarray.DataArray]
    """Dimensions (depth, prompt)."""
    y_title: str
    reading: str
    logarithmic: bool = False
    """Whether it spans orders of magnitude, so that its logarithm is what is drawn and correlated."""


STAGE_QUANTITIES = (
    StageQuantity(
        anchor="concentration",
        name="attention concentration",
        variable="colsum_concentration",
        of_prompt=lambda data: data["colsum_concentration"].mean("head"),
        y_title="ColSum concentration",
        reading="1 if all attention goes to one token; mean over heads. Its minimum depends on the prompt's length.",
    ),
    StageQuantity(
        anchor="sinks",
        name="sink rate",
        variable="sink_score",
        of_prompt=lambda data: (data["sink_score"] >= SINK_THRESHOLD).where(data["sink_score"].notnull()).mean("head"),
        y_title="sink rate",
        reading=f"share of heads that give the first token at least {100 * SINK_THRESHOLD:g} % of their attention.",
    ),
    StageQuantity(
        anchor="mixing",
        name="mixing",
        variable="relative_mixing_score",
        of_prompt=lambda data: data["relative_mixing_score"].mean("head"),
        y_title="row entropy / its maximum",
        reading="1 if every token attends evenly to all before it, 0 if only to one; mean over heads and rows.",
    ),
    StageQuantity(
        anchor="entropy",
        name="residual entropy",
        variable="relative_residual_entropy",
        of_prompt=lambda data: data["relative_residual_entropy"],
        y_title="entropy / log min(T, D)",
        reading="entropy of the squared singular values; near 0, one direction holds almost all of the norm.",
    ),
    StageQuantity(
        anchor="magnitude",
        name="residual magnitude",
        variable="mean_token_norm",
        of_prompt=lambda data: data["mean_token_norm"],
        y_title="mean token norm",
        reading="Euclidean norm of a token's state; mean over tokens.",
    ),
    StageQuantity(
        anchor="massive",
        name="massive activations",
        variable="massive_activation",
        of_prompt=lambda data: data["massive_activation"],
        y_title="largest / median |entry|",
        reading="largest over median |entry| of a prompt's states; in the thousands where one entry stands out.",
        logarithmic=True,
    ),
)
"""Those of the paper, by which stages are judged and compared."""

VISIT_QUANTITIES = (
    *STAGE_QUANTITIES,
    StageQuantity(
        anchor="rank",
        name="effective rank",
        variable="effective_rank",
        of_prompt=lambda data: data["effective_rank"],
        y_title="effective rank",
        reading="exponential of the entropy of the normalised singular values, between 1 and min(T, D).",
    ),
)
"""All that figures show of every visit."""
