"""The types of figure that show one study."""

from __future__ import annotations

from functools import partial

from loopscope._util.sinks import SINK_THRESHOLD
from loopscope.report.paper import heads, maps
from loopscope.report.paper.captions import PER_ROW
from loopscope.report.paper.inference import FEW, judged_at
from loopscope.report.paper.kinds import FigureType, one_recurrence, study_type
from loopscope.report.paper.of_stages import STAGE_FIGURES
from loopscope.study import Readings


def _cycle_no_longer(readings: Readings) -> str | None:
    if len(maps.cycle_labels(readings, None)) > len(maps.cycle_labels(readings, FEW)):
        return None
    return f"the study holds no more than the first {FEW} recurrences (--cycle-recurrences)"


def _maps_words(visits: str) -> str:
    return f"Distance between the attention maps of every two {visits}, over all heads, mean over prompts. {PER_ROW}"


def _states_words(visits: str) -> str:
    return f"Cosine between the residual streams after every two {visits}, mean over tokens and prompts."


def _visits(readings: Readings) -> str:
    if not readings.view.looped:
        return "layers"
    return f"visits of the first {min(FEW, readings.view.recurrences)} recurrences"


STUDY_FIGURES: tuple[FigureType[Readings], ...] = (
    study_type(
        "layer-cosine",
        maps.layer_cosine,
        "Cosine between the residual streams of the recurrent layers at the horizon H, median over prompts of means "
        "over tokens. All near 1: the layers share one point, and the cycle is no cycle.",
        ("layer_cosine",),
    ),
    study_type(
        "cycle-attention",
        maps.cycle_attention,
        lambda readings: (
            f"{_maps_words(_visits(readings))} Dark diagonals: each layer attends as it did one pass before."
        ),
        ("attention_cycle_distance",),
        (2,),
        loops=False,
    ),
    study_type(
        "cycle-attention-long",
        partial(maps.cycle_attention, recurrences=None),
        _maps_words("visits of all the recurrences kept"),
        ("attention_cycle_distance",),
        (21,),
        unless=_cycle_no_longer,
    ),
    study_type(
        "cycle-residual",
        maps.cycle_residual,
        lambda readings: _states_words(_visits(readings)),
        ("cycle_similarity",),
        (19,),
        loops=False,
    ),
    study_type(
        "cycle-residual-long",
        partial(maps.cycle_residual, recurrences=None),
        _states_words("visits of all the recurrences kept"),
        ("cycle_similarity",),
        (20,),
        unless=_cycle_no_longer,
    ),
    study_type(
        "head-change",
        heads.head_change,
        "How much each head's attention map changes from one recurrence to the next, a row per head, median over "
        f"prompts. {PER_ROW} White lines part the recurrent layers; no colour: no change at all.",
        ("attention_change",),
        unless=one_recurrence,
    ),
    study_type(
        "heads-stable",
        heads.heads_stable,
        lambda readings: (
            "Share of heads, over all prompts, that are stable after so many recurrences: whose change per row stays"
            f" at or below {readings.view.head_stable:g} from there on. The last recurrence measured cannot count. "
            "One line per recurrent layer."
        ),
        # Not head_stable_from: a head that is never stable has no number, so that may be finite nowhere.
        ("attention_change",),
        unless=one_recurrence,
    ),
    study_type(
        "head-sinks",
        heads.head_sinks,
        lambda readings: (
            "Share of each head's attention that the first token receives, along one pass"
            + (f" (recurrence {judged_at(readings)})" if readings.view.looped else "")
            + f", median over prompts. A head has a sink from {SINK_THRESHOLD:g} on."
            + (" White lines part prelude, block and coda." if readings.view.looped else "")
        ),
        ("sink_score",),
        loops=False,
    ),
    *STAGE_FIGURES,
)
