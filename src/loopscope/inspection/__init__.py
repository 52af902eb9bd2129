"""What a model is, and what running it would take, from configuration and headers alone."""

from loopscope.inspection.facts import Inspection, ParameterCounts, TokenizerFacts
from loopscope.inspection.inspecting import inspect_model
from loopscope.inspection.memory import MemoryEstimate

__all__ = ["Inspection", "MemoryEstimate", "ParameterCounts", "TokenizerFacts", "inspect_model"]
