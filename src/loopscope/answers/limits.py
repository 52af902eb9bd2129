"""What limits these answers?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from loopscope._util.sinks import SINK_THRESHOLD, sink_by_chance
from loopscope._util.statistics import median
from loopscope._util.wording import listed, percent, plural, significant
from loopscope.answers.answer import Answer, Criterion, Evidence, Outcome, Question, diverged_prompts, few_prompts
from loopscope.answers.settling import late_prompts, noise_floor, parted_prompts, prompt_settling, slows_down
from loopscope.study import StudyView

LIMITS = Question(key="limits", text="What limits these answers?", figure="limits")
_DIGITS = {"float64": 1e-12, "float32": 1e-5}
"""Noise floors that no conclusion here comes near; in other types the floor is always worth a word."""


def limits_answer(view: StudyView, criterion: Criterion, answers: Sequence[Answer]) -> Answer:
    """Gather what the numbers cannot show, the gravest first, and the limits of the other answers."""
    found = [
        *_named("the interventions", _interventions(view)),
        *_named("the loop itself", list(view.manifest["model"].get("loop_limits", ()))),
        *_named("generated tokens", _generated(view)),
        *_named("divergence", diverged_prompts(view)),
        *_horizon(view, criterion),
        *_named("the number of prompts", few_prompts(view, criterion)),
        *_named("short prompts", short_prompts(view)),
        *_rounding(view, criterion),
        *_predictability(view),
    ]
    named: dict[str, str] = {}
    for name, text in found:
        named.setdefault(name, text)
    sentences = [text for _, text in found]
    others = (limit for answer in answers for limit in answer.limits)
    gathered = list(dict.fromkeys([*sentences, *_stopped(view), *others]))
    if named:
        return LIMITS.says(
            Outcome.CANNOT_TELL, listed(list(named)), " ".join(named.values()), _evidence(view), gathered
        )
    little = f"Little: {plural(view.prompts, 'prompt')} and {plural(view.tokens, 'token')} in {view.dtype}"
    little += f", followed to {view.second_horizon} recurrences." if view.looped else "."
    return LIMITS.says(Outcome.YES, "little", little, _evidence(view), gathered)


def sinks_by_chance(counts: Sequence[int]) -> list[str]:
    """The warning that goes with every sink of prompts that are so short that chance makes one; `counts` are tokens."""
    short = [count for count in counts if sink_by_chance(count)]
    if not short:
        return []
    who = f"{len(short)} of {len(counts)} prompts have" if len(counts) > 1 else "This prompt has"
    most = f"{max(short)} at most" if len(counts) > 1 else f"{max(short)}"
    return [
        f"{who} so few tokens ({most}) that evenly spread attention already gives the first token "
        f"{SINK_THRESHOLD:g} or more: a sink score as high means nothing there."
    ]


def short_prompts(view: StudyView) -> list[str]:
    """The same for all prompts of a study, if it has sink scores."""
    if "sink_score" not in view.dataset:
        return []
    return sinks_by_chance([int(count) for count in view.dataset["token_count"].values])


def _interventions(view: StudyView) -> list[str]:
    if not view.interventions:
        return []
    changes = ", ".join(view.interventions)
    return [f"The model was changed while it ran ({changes}), so the answers are not about the unchanged model."]


def _generated(view: StudyView) -> list[str]:
    written = view.manifest.get("prompts", {}).get("generated_tokens")
    if not written:
        return []
    return [
        f"{plural(int(written), 'token')} of {view.tokens:,} were written by the model itself, the likeliest each "
        "time: all answers count them, and the loss and the entropy there are those of its own choices."
    ]


def _named(name: str, sentences: list[str]) -> list[tuple[str, str]]:
    return [(name, sentence) for sentence in sentences]


def _evidence(view: StudyView) -> Evidence:
    evidence: Evidence = {
        "prompts": float(view.prompts),
        "tokens": float(view.tokens),
        "diverged_prompts": float(view.diverged),
        "dtype": view.dtype,
    }
    if view.looped:
        evidence |= {
            "recurrences_measured": float(view.recurrences),
            "horizon": float(view.horizon),
            "second_horizon": float(view.second_horizon),
            "noise_floor": median(noise_floor(view.finite).values),
        }
    return evidence


def _horizon(view: StudyView, criterion: Criterion) -> list[tuple[str, str]]:
    if not view.looped:
        return []
    found = []
    left_open = np.array([not kind.decided for kind in prompt_settling(view, criterion)], dtype=bool)
    left_open &= ~parted_prompts(view, criterion)
    unsettled = int(left_open.sum())
    # A few among many may be scatter of the two steps that are compared.
    if unsettled > (1 - criterion.prompts_needed) * view.prompts:
        late = late_prompts(view, criterion)
        said = f"{unsettled} of {view.prompts} prompts {'is' if unsettled == 1 else 'are'} undecided by recurrence "
        said += f"{view.second_horizon}"
        if late[left_open].all():
            said = f"{unsettled} of {view.prompts} prompts came to rest only after recurrence {view.horizon}"
            found.append(("the horizon", f"{said}; set the horizon higher."))
        elif (slows_down(view, criterion) & left_open).any():
            found.append(("the horizon", f"{said}; a longer horizon may decide."))
        else:
            found.append(
                ("undecided prompts", f"{said}; no step shrinks, so that a longer horizon may decide no better.")
            )
    if view.recurrences > view.horizon:
        found.append(
            (
                "degenerate distances",
                f"{view.recurrences} recurrences were measured but the horizon is {view.horizon}: the distance is "
                "0 there by construction, and beyond it the state is compared with an earlier one. Read the "
                "distance to the second horizon, or set the horizon higher.",
            )
        )
    if view.trained is not None and view.horizon < 2 * view.trained:
        found.append(
            (
                "the horizon",
                f"The horizon ({view.horizon}) is less than twice the trained depth ({view.trained}), so it shows "
                "little of what happens beyond that depth.",
            )
        )
    return found


def _stopped(view: StudyView) -> list[str]:
    """Of prompts whose run ended before twice the horizon."""
    stopped = view.dataset["stopped_at"].values if "stopped_at" in view.dataset else np.empty(0)
    ends = np.unique(stopped[stopped > 0])
    if not ends.size:
        return []
    least = view.manifest["settings"]["stop_at_rest"]
    after = f"{ends[0]}" if ends.size == 1 else f"{ends[0]} to {ends[-1]}"
    return [
        f"The run of {(stopped > 0).sum()} of {plural(view.prompts, 'prompt')} ended after {after} recurrences rather "
        f"than {2 * view.horizon}, since each of their tokens had rested at its noise floor for {least}: what is said "
        "of 2H is said of the state there."
    ]


def _rounding(view: StudyView, criterion: Criterion) -> list[tuple[str, str]]:
    if not view.looped or not view.finite.sizes["prompt"]:
        return []
    floor = median(noise_floor(view.finite).max("layer").values)
    if math.isnan(floor):
        unknown = "The noise floor was not measured, so small movement may be rounding."
        return [("the unknown noise floor", unknown)]
    if floor <= _DIGITS.get(view.dtype, 0.0):
        return []
    text = (
        f"In {view.dtype} rounding alone makes relative steps of {significant(floor)}; smaller movement cannot be seen."
    )
    if criterion.floor_factor * floor > criterion.drift_tolerance:
        text += f" That is close to, or above, the tolerance of {percent(criterion.drift_tolerance)}: use float32."
    return [("rounding", text)]


def _predictability(view: StudyView) -> list[tuple[str, str]]:
    """After how many recurrences a run that differs by rounding alone is another one."""
    data = view.dataset
    if not view.looped or "twin_parted" not in data:
        return []
    parted = data["twin_parted"].values
    reached = parted[(parted > 0) & (parted <= max(view.recurrences, view.horizon))]
    if not reached.size:
        return []
    tokens = f"{reached.size} of {plural(view.tokens, 'token')}"
    text = (
        f"In {tokens}, runs that differ by one rounding in each recurrence are a tenth of the norm apart after "
        f"{median(reached):.0f} recurrences (median): later states are those of this run in {view.dtype} rather than "
        "of the model."
    )
    return [("the horizon of predictability", text)]
