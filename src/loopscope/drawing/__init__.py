"""What every drawing of a study needs, whatever draws it: medians over prompts, where visits stand, colours, texts."""

from loopscope.drawing.colours import (
    BAND,
    CATEGORIES,
    GRID,
    INK,
    MUTED,
    layer_colours,
    named_in_legend,
    ordered_colours,
)
from loopscope.drawing.readings import Readings, median_over_prompts, positive, quantile_over, read_study
from loopscope.drawing.shares import final_shares, per_row, stable_share
from loopscope.drawing.sites import Site, powers_of_two, sites_of, stage_name, stage_starts
from loopscope.drawing.texts import visible

__all__ = [
    "BAND",
    "CATEGORIES",
    "GRID",
    "INK",
    "MUTED",
    "Readings",
    "Site",
    "final_shares",
    "layer_colours",
    "median_over_prompts",
    "named_in_legend",
    "ordered_colours",
    "per_row",
    "positive",
    "powers_of_two",
    "quantile_over",
    "read_study",
    "sites_of",
    "stable_share",
    "stage_name",
    "stage_starts",
    "visible",
]
