"""Studies compared: their stages of inference on relative depth, looped or feed-forward."""

from loopscope.answers.comparison.comparing import compare
from loopscope.answers.comparison.findings import comparison_answers
from loopscope.answers.comparison.null import curve_similarity
from loopscope.answers.comparison.result import Comparison

__all__ = ["Comparison", "compare", "comparison_answers", "curve_similarity"]
