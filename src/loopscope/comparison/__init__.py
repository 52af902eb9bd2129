"""Studies compared: their stages of inference on relative depth, looped or feed-forward."""

from loopscope.comparison.comparing import SPANS, compare
from loopscope.comparison.curves import MEASURES
from loopscope.comparison.findings import comparison_answers
from loopscope.comparison.null import Likeness, curve_similarity
from loopscope.comparison.result import Comparison

__all__ = ["MEASURES", "SPANS", "Comparison", "Likeness", "compare", "comparison_answers", "curve_similarity"]
