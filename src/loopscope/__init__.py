"""loopscope: an instrument for looking inside looped language models.

The public names are imported when they are first used, so that `import loopscope` and `loopscope --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopscope.analysis import analyze
    from loopscope.answers import Answer, Criterion, quick_answers
    from loopscope.architecture import Architecture
    from loopscope.comparison import Comparison, compare
    from loopscope.controlled import Control, control
    from loopscope.errors import LoopscopeError
    from loopscope.hooks import hook
    from loopscope.inspection import Inspection, inspect_model
    from loopscope.loading import load
    from loopscope.model import LoopedTransformer
    from loopscope.report import write_comparison, write_report
    from loopscope.settings import AnalyzeSettings
    from loopscope.stability import leading_eigenvalues
    from loopscope.study import Study
    from loopscope.subject import Subject
    from loopscope.trace import Trace, capture
    from loopscope.visits import Observer, Visit

_HOMES = {
    "Answer": "answers",
    "AnalyzeSettings": "settings",
    "Architecture": "architecture",
    "Comparison": "comparison",
    "Control": "controlled",
    "Criterion": "answers",
    "Inspection": "inspection",
    "LoopedTransformer": "model",
    "LoopscopeError": "errors",
    "Observer": "visits",
    "Study": "study",
    "Subject": "subject",
    "Trace": "trace",
    "Visit": "visits",
    "analyze": "analysis",
    "capture": "trace",
    "compare": "comparison",
    "control": "controlled",
    "hook": "hooks",
    "inspect_model": "inspection",
    "leading_eigenvalues": "stability",
    "load": "loading",
    "quick_answers": "answers",
    "write_comparison": "report",
    "write_report": "report",
}

__all__ = [
    "AnalyzeSettings",
    "Answer",
    "Architecture",
    "Comparison",
    "Control",
    "Criterion",
    "Inspection",
    "LoopedTransformer",
    "LoopscopeError",
    "Observer",
    "Study",
    "Subject",
    "Trace",
    "Visit",
    "analyze",
    "capture",
    "compare",
    "control",
    "hook",
    "inspect_model",
    "leading_eigenvalues",
    "load",
    "quick_answers",
    "write_comparison",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loopscope' has no attribute {name!r}")
    value = getattr(import_module(f"loopscope.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
