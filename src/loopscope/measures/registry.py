"""All measures: what an analysis runs, what a study declares, and why a study may lack a variable."""

from __future__ import annotations

from collections.abc import Iterator

from loopscope.measures.base import BatchInfo, Declared, Measure, Plan, Variable, variable
from loopscope.measures.behaviour import Behaviour
from loopscope.measures.cache import SharedCache
from loopscope.measures.cka import VisitCKA
from loopscope.measures.convergence import Convergence
from loopscope.measures.heads import HeadMeasures
from loopscope.measures.horizon import Horizons, NoiseFloor
from loopscope.measures.layer_readout import LayerReadout
from loopscope.measures.maps import AttentionMaps
from loopscope.measures.neurons import Neurons
from loopscope.measures.path import PathIndependence
from loopscope.measures.rank import EffectiveRank
from loopscope.measures.readout import Readout
from loopscope.measures.rest import Rest
from loopscope.measures.similarity import AttentionCycle, CycleSimilarity
from loopscope.measures.sinks import SinkMass
from loopscope.measures.stability import TokenStability
from loopscope.measures.stages import StageMeasures
from loopscope.measures.support import AttentionSupport
from loopscope.measures.trajectories import Trajectories
from loopscope.measures.twin import Twin
from loopscope.models.subject import SubjectInfo

MEASURES: tuple[type[Measure], ...] = (
    Convergence,
    Horizons,
    NoiseFloor,
    Twin,
    Rest,
    PathIndependence,
    CycleSimilarity,
    AttentionCycle,
    HeadMeasures,
    SinkMass,
    AttentionSupport,
    SharedCache,
    VisitCKA,
    AttentionMaps,
    StageMeasures,
    EffectiveRank,
    Readout,
    LayerReadout,
    Behaviour,
    TokenStability,
    Trajectories,
)
"""In the order in which docs/study.md lists them. Where two end with the same run, the first is asked first."""


class Always(Declared):
    """What the job itself adds."""

    variables = {  # noqa: RUF012 - declared as in every measure
        "token_count": variable(
            "prompt", "tokens of the prompt, including special tokens and the system prompt", "tokens"
        ),
        "diverged_at": variable(
            "prompt",
            "number of recurrences after which a token's norm is first not finite (in float32 beyond 1.8e19); "
            "-1 if it stays finite",
            "recurrences",
        ),
    }


DECLARED: tuple[type[Declared], ...] = (*MEASURES, Neurons, Always)


def declared_variables() -> dict[str, Variable]:
    """Every variable that a study may hold, by name."""
    return {name: about for kind in DECLARED for name, about in kind.variables.items()}


def why_absent(kind: type[Declared], info: SubjectInfo, plan: Plan) -> str | None:
    """Why a study of this model has nothing of it; None if it has."""
    skipped = next((part for part in (kind.part, *kind.needs.also) if part in plan.skip), None)
    if skipped is not None:
        return f"the analysis was told to leave it out (--skip {skipped})"
    if kind.needs.loop and not info.is_looped:
        return "a feed-forward model has no recurrences"
    if kind.needs.attention and info.heads is None:
        return "no layer's attention can be seen, or layers have different numbers of heads"
    if kind.needs.second_run and not info.can_start_elsewhere:
        return "the model cannot be started from another initial state"
    return kind.absent(info, plan)


def asked_for(batch: BatchInfo) -> Iterator[type[Measure]]:
    """The measures that have something to do in a batch."""
    for kind in MEASURES:
        missing = (kind.needs.second_run and not batch.second_run) or (kind.needs.twin and not batch.has_twin)
        if not missing and why_absent(kind, batch.info, batch.plan) is None and kind.applies(batch):
            yield kind


def absent_variables(found: set[str], info: SubjectInfo, plan: Plan) -> dict[str, str]:
    """What a study lacks of all that is declared, and why."""
    return {
        name: why_absent(kind, info, plan) or kind.lacks(name, plan)
        for kind in DECLARED
        for name in kind.variables
        if name not in found
    }
