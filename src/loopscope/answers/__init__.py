"""Quick answers: plain sentences with their evidence, drawn from a study and nothing else."""

from loopscope.answers.answer import Answer, Outcome
from loopscope.answers.criterion import Criterion
from loopscope.answers.quick import quick_answers

__all__ = ["Answer", "Criterion", "Outcome", "quick_answers"]
