"""loopscope: an instrument for looking inside looped language models.

The public names are imported when they are first used, so that `import loopscope` and `loopscope --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopscope.analysis.analyzing import analyze as analyze
    from loopscope.analysis.generating import Generation as Generation
    from loopscope.analysis.generating import generate as generate
    from loopscope.analysis.patching import patch as patch
    from loopscope.analysis.probing import Probes as Probes
    from loopscope.analysis.probing import probe as probe
    from loopscope.analysis.settings import AnalyzeSettings as AnalyzeSettings
    from loopscope.analysis.steering import Steering as Steering
    from loopscope.analysis.steering import steer as steer
    from loopscope.answers.answer import Answer as Answer
    from loopscope.answers.answer import Criterion as Criterion
    from loopscope.answers.calibration import CalibratedRule as CalibratedRule
    from loopscope.answers.calibration import calibrate_exit as calibrate_exit
    from loopscope.answers.comparison.comparing import compare as compare
    from loopscope.answers.comparison.result import Comparison as Comparison
    from loopscope.answers.comparison.side_by_side import side_by_side as side_by_side
    from loopscope.answers.patching import Patching as Patching
    from loopscope.answers.quick import quick_answers as quick_answers
    from loopscope.answers.rates import study_rates as study_rates
    from loopscope.dynamics.eigenvalues.exponents import LyapunovExponents as LyapunovExponents
    from loopscope.dynamics.eigenvalues.exponents import lyapunov_exponents as lyapunov_exponents
    from loopscope.dynamics.eigenvalues.of_model import leading_eigenvalues as leading_eigenvalues
    from loopscope.dynamics.trajectories.judge import judge as judge
    from loopscope.errors import LoopscopeError as LoopscopeError
    from loopscope.evaluation.evaluating import evaluate as evaluate
    from loopscope.evaluation.result import Evaluation as Evaluation
    from loopscope.experiments.damping import Control as Control
    from loopscope.experiments.damping import control as control
    from loopscope.experiments.training.probe import LoopProbe as LoopProbe
    from loopscope.models.architecture import Architecture as Architecture
    from loopscope.models.contract.check import check_subject as check_subject
    from loopscope.models.hooks.wrap import hook as hook
    from loopscope.models.inspection.facts import Inspection as Inspection
    from loopscope.models.inspection.inspecting import inspect_model as inspect_model
    from loopscope.models.loading import load as load
    from loopscope.models.native.transformer import LoopedTransformer as LoopedTransformer
    from loopscope.models.subject import Subject as Subject
    from loopscope.models.trace import Trace as Trace
    from loopscope.models.trace import capture as capture
    from loopscope.models.visits import Observer as Observer
    from loopscope.models.visits import Visit as Visit
    from loopscope.report.exported import write_export as write_export
    from loopscope.report.figures.write import write_figures as write_figures
    from loopscope.report.page.write import write_comparison as write_comparison
    from loopscope.report.page.write import write_report as write_report
    from loopscope.study import Study as Study

_HOMES = {
    "AnalyzeSettings": "analysis.settings",
    "Answer": "answers.answer",
    "Architecture": "models.architecture",
    "CalibratedRule": "answers.calibration",
    "Comparison": "answers.comparison.result",
    "Control": "experiments.damping",
    "Criterion": "answers.answer",
    "Evaluation": "evaluation.result",
    "Generation": "analysis.generating",
    "Inspection": "models.inspection.facts",
    "LoopProbe": "experiments.training.probe",
    "LoopedTransformer": "models.native.transformer",
    "LoopscopeError": "errors",
    "LyapunovExponents": "dynamics.eigenvalues.exponents",
    "Observer": "models.visits",
    "Patching": "answers.patching",
    "Probes": "analysis.probing",
    "Steering": "analysis.steering",
    "Study": "study",
    "Subject": "models.subject",
    "Trace": "models.trace",
    "Visit": "models.visits",
    "analyze": "analysis.analyzing",
    "calibrate_exit": "answers.calibration",
    "capture": "models.trace",
    "check_subject": "models.contract.check",
    "compare": "answers.comparison.comparing",
    "control": "experiments.damping",
    "evaluate": "evaluation.evaluating",
    "generate": "analysis.generating",
    "hook": "models.hooks.wrap",
    "inspect_model": "models.inspection.inspecting",
    "judge": "dynamics.trajectories.judge",
    "leading_eigenvalues": "dynamics.eigenvalues.of_model",
    "load": "models.loading",
    "lyapunov_exponents": "dynamics.eigenvalues.exponents",
    "patch": "analysis.patching",
    "probe": "analysis.probing",
    "quick_answers": "answers.quick",
    "side_by_side": "answers.comparison.side_by_side",
    "steer": "analysis.steering",
    "study_rates": "answers.rates",
    "write_comparison": "report.page.write",
    "write_export": "report.exported",
    "write_figures": "report.figures.write",
    "write_report": "report.page.write",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("loopscope")
    if name not in _HOMES:
        raise AttributeError(f"module 'loopscope' has no attribute {name!r}")
    value = getattr(import_module(f"loopscope.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
