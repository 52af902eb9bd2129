"""What stands below a figure: sentences that are true of the study that it was drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loopscope._util.wording import layout_text, plural, visible
from loopscope.answers.comparison.result import Comparison
from loopscope.report.paper.layouts import MOST_JOINED, Layout
from loopscope.study import Readings

PER_ROW = "Frobenius distances are over the square root of the number of tokens."

_LONGEST = 80
"""Characters of a name from outside."""


def study_subject(readings: Readings) -> str:
    """Model, number type, prompts and horizon, and what is unusual about them."""
    view, model = readings.view, readings.manifest["model"]
    facts = [f"Model {visible(str(model['name']), _LONGEST)}, {readings.layout}"]
    if view.looped:
        facts.append(f"injection {view.injection}")
    facts.append(f"run in {view.dtype}")
    sentences = [f"{', '.join(facts)}.", _prompts(readings)]
    if view.looped:
        trained = "an unknown number" if view.trained is None else plural(view.trained, "recurrence")
        sentences.append(
            f"{plural(view.recurrences, 'recurrence')} measured, horizon H = {view.horizon}; trained with {trained}."
        )
    if view.interventions:
        sentences.append(f"The model was changed while it ran: {', '.join(view.interventions)}.")
    if view.diverged:
        sentences.append(
            "All prompts diverged; what is drawn is finite."
            if view.diverged == view.prompts
            else f"{plural(view.diverged, 'prompt')} of {view.prompts} diverged and left out."
        )
    return " ".join(sentences)


def comparison_subject(comparison: Comparison) -> str:
    """The studies, and which of them is the reference."""
    studies = [
        _study(label, study, reference=label == comparison.reference) for label, study in comparison.studies.items()
    ]
    return f"Medians over prompts. Studies: {'; '.join(studies)}."


def line_words(readings: Readings, layout: Layout, band: str, recurrences: Sequence[int] = ()) -> str:
    """What the lines of a layout are; `band` says what the grey band holds, nothing where there is none. `recurrences`
    are the lines of a drawing by recurrence, and the last of them the last that one by depth shows."""
    view, where = readings.view, ""
    if layout == "by layer":
        sentences, where = ["One line per recurrent layer over the recurrences."], " is that of the last layer and"
    elif layout == "by recurrence":
        lines = (
            f"One line per recurrence ({', '.join(map(str, recurrences))}) along the depth of one pass, later lighter"
        )
        outside = readings.prelude + readings.coda
        sentences = [f"{lines}; prelude and coda, which run once, are shaded." if outside else f"{lines}."]
        where = " is that of the last of them and"
    else:
        joined = view.looped and readings.recurrent <= MOST_JOINED
        upto = (
            f" of the first {recurrences[-1]} recurrences" if view.looped and recurrences[-1] < view.recurrences else ""
        )
        sentences = [
            f"All layer applications{upto} in order" + ("; coloured lines join those of a layer." if joined else ".")
        ]
    if band:
        sentences.append(f"The grey band{where} holds {band}.")
    reached = view.recurrences if layout == "by layer" else max(recurrences, default=0) - 1
    if layout != "by recurrence" and view.looped and view.trained is not None and view.trained <= reached:
        sentences.append("Dashed: the trained number of recurrences.")
    return " ".join(sentences)


def _prompts(readings: Readings) -> str:
    view = readings.view
    source = readings.manifest.get("prompts", {}).get("source")
    named = f" from {visible(str(source), _LONGEST)}" if source else ""
    return f"{plural(view.prompts, 'prompt')}{named}, {plural(view.tokens, 'token')}."


def _study(label: str, study: Mapping[str, Any], *, reference: bool) -> str:
    layout, prompts = study["layout"], study["prompts"]
    facts = [layout_text(layout["prelude"], layout["recurrent"], layout["coda"])]
    if study["judged_at"]:
        facts.append(f"judged at recurrence {study['judged_at']} of {study['recurrences']}")
    facts.append(f"run in {study['dtype']}")
    nouns = {"count": "prompt", "tokens": "token"}
    facts += [plural(int(prompts[name]), noun) for name, noun in nouns.items() if prompts.get(name) is not None]
    if study["diverged_prompts"]:
        facts.append(f"{plural(study['diverged_prompts'], 'diverged prompt')} left out")
    return f"{visible(label, _LONGEST)}{' (reference)' if reference else ''}: {', '.join(facts)}"
