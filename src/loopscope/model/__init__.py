"""The native looped transformer: one implementation, of which every published family is a setting."""

from loopscope.model.edits import Edits, RunEdits
from loopscope.model.state import initial_noise
from loopscope.model.transformer import LoopedTransformer, Sequence

__all__ = ["Edits", "LoopedTransformer", "RunEdits", "Sequence", "initial_noise"]
