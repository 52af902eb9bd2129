"""A study's tokens for the panel: which prompts are shown, and what is said of each token."""

from __future__ import annotations

import math

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import listed, percent, significant, visible
from loopscope.dynamics.prediction import PREDICTED_KINDS
from loopscope.dynamics.prediction import PredictedKind as Predicted
from loopscope.dynamics.verdicts import DOUBTS, KINDS, Kind
from loopscope.report.figures.plot import Drawn, Section, on_page
from loopscope.report.figures.token_panel import (
    FACTS,
    PanelGroup,
    PanelToken,
    TokenPanel,
    facts_of,
    token_panel,
    walked,
)
from loopscope.report.figures.verdicts import VERDICTS
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_PROMPTS = 4
"""Prompts in the page unless the settings name some: with 200 tokens each they take half a MB."""
_TOKENS = 200
"""Of a longer prompt, the last that many."""
_Arrays = dict[str, np.ndarray]
"""Of one prompt by name, the token last."""
_MOVING = (Kind.ORBIT, Kind.SLIDER, Kind.BOUNDED, Kind.DIVERGING)
_TURNING = (Predicted.DAMPED_ROTATION, Predicted.ORBIT, Predicted.PERIOD_TWO)


def prompts_panel(view: StudyView, settings: ReportSettings) -> list[TokenPanel]:
    """The tokens of some prompts, after the last recurrent layer."""
    data = view.dataset.isel(judged_layer=-1).transpose(..., "prompt", "token", missing_dims="ignore")
    chosen = list(settings.prompts) or _interesting(data)
    if not chosen:
        return []
    groups = [_group(view, data, prompt) for prompt in chosen]
    return [
        token_panel(
            groups,
            title="Token by token: what does each one do?",
            caption=(
                f"States after recurrent layer {int(data['judged_layer'])}. Pick a token, with the mouse or the arrow "
                "keys, to see its path and its displacement, which is flat for an orbit or for noise and grows in "
                "proportion to the lag for a slider."
                + (" The prompts shown are those with the rarest kinds." if not settings.prompts else "")
            ),
            choose="Prompt",
        )
    ]


def verdict_line(kind: Kind, numbers: dict[str, float], doubt: int = -1) -> str:
    """What decided, from the numbers that a study keeps; a length is a share of the norm. `doubt` is a place in
    `DOUBTS`, -1 for none."""
    level, floor = numbers["level"], numbers["floor"]
    moves = f"it still moves by {percent(level)} of its norm" if math.isfinite(level) else ""
    if moves and floor > 0:
        moves += f", {significant(level / floor)} times the noise floor"
    special = {
        Kind.ORBIT: _said("It is periodic, with {} recurrences a turn", numbers["period"])
        + _said(", at {} of its norm from the centre", numbers["amplitude"], percent),
        Kind.SLIDER: _said("It moves on by {} of its norm per recurrence", numbers["speed"], percent),
        Kind.FIXED_POINT: _said("Its distance to the limit shrinks by a factor of {} per recurrence", numbers["rate"]),
        Kind.DIVERGING: _said("Its distance grows by a factor of {} per recurrence", numbers["rate"]),
    }.get(kind, "")
    parts = [part for part in (special, moves) if part]
    if not parts:
        return "The study keeps no number that says why." if kind is not Kind.DIVERGING else "It is no longer finite."
    text = "; ".join(parts)
    said = f"{text[0].upper()}{text[1:]}."
    return f"{DOUBTS[doubt]} {said}" if doubt >= 0 else said


def _said(sentence: str, value: float, shown: object = significant) -> str:
    assert callable(shown)
    return sentence.format(shown(value)) if math.isfinite(value) else ""


def _interesting(data: xarray.Dataset) -> list[int]:
    """Prompts that between them show the rarest kinds: for each kind the prompt with most of it, rarest kind first."""
    codes = data["verdict"].values
    counts = np.stack([(codes == place).sum(-1) for place in range(len(KINDS))])
    order = np.argsort(counts.sum(-1), kind="stable")
    found = [int(counts[place].argmax()) for place in order if counts[place].any()]
    return list(dict.fromkeys([*found, *range(codes.shape[0])]))[:_PROMPTS]


def _group(view: StudyView, data: xarray.Dataset, prompt: int) -> PanelGroup:
    strings = view.strings(prompt)
    first = max(0, len(strings) - _TOKENS)
    # As arrays once, the token last: a data set takes longer to find one token than all that is said of it.
    arrays = ((str(name), data.variables[name]) for name in data.data_vars)
    here = {name: each.values[..., prompt, :] for name, each in arrays if each.dims[-2:] == ("prompt", "token")}
    here["change"] = data["change"].values
    tokens = [_token(here, place, strings[place]) for place in range(first, len(strings))]
    entry = view.study.tokens[prompt]
    text = str(entry["text"] or "".join(strings))
    return PanelGroup(
        name=f"Prompt {prompt}: {visible(text, 70)}",
        tokens=tokens,
        first=first,
        start=_first_shown(tokens, here["verdict_level"][first : len(strings)]),
        note=f"The last {_TOKENS} of its {len(strings)} tokens." if first else "",
    )


def _first_shown(tokens: list[PanelToken], levels: NDArray[np.floating]) -> int:
    """A token of the rarest kind that does not settle, of these the one that moves most."""
    counts = [sum(token.kind is other.kind for other in tokens) for token in tokens]
    moving = [token.kind in _MOVING for token in tokens]
    moved = np.nan_to_num(levels)
    return min(
        range(len(tokens)), key=lambda place: (not moving[place], counts[place], -float(moved[place])), default=0
    )


def _token(here: _Arrays, place: int, string: str) -> PanelToken:
    code = int(here["verdict"][place])
    if code < 0:
        return PanelToken(label=string, kind=None, line="It was not judged.")
    kind = KINDS[code]
    numbers = {name: float(here[f"verdict_{name}"][place]) for name in FACTS}
    other = int(here["verdict_cosine"][place])
    facts = [("by the cosine method", str(KINDS[other]) if other >= 0 else "not judged")]
    return PanelToken(
        label=string,
        kind=kind,
        line=verdict_line(kind, numbers, int(here["verdict_doubt"][place]) if "verdict_doubt" in here else -1),
        facts=[
            *facts,
            *facts_of(numbers),
            *_trials(here["change"], here["verdict_changes"][:, place]),
            *_predicted(here, place),
        ],
        path=walked(here["tail_path"][..., place].T) if "tail_path" in here else None,
        curve=here["displacement"][:, place] if "displacement" in here else None,
        floor=numbers["floor"],
        eigenvalues=_eigenvalues(here, place),
    )


def _predicted(here: _Arrays, place: int) -> list[tuple[str, str]]:
    """What the token's eigenvalues and its steps say, where they were taken."""
    names = ["predicted_rate", "observed_rate"]
    found = []
    if "predicted_kind" in here:
        code = int(here["predicted_kind"][place])
        found.append(("predicted", str(PREDICTED_KINDS[code]) if code >= 0 else "nothing"))
        if code >= 0 and PREDICTED_KINDS[code] in _TURNING:
            names.append("predicted_period")
        if here["damping_needed"][place] < 1:
            names.append("damping_needed")
    for name in names:
        value = float(here[name][place]) if name in here else math.nan
        if math.isfinite(value):
            found.append((name.replace("_", " "), significant(value, 3)))
    return found


def _eigenvalues(here: _Arrays, place: int) -> NDArray[np.complexfloating] | None:
    if "eigenvalue_real" not in here:
        return None
    real, imaginary = (here[f"eigenvalue_{part}"][..., place] for part in ("real", "imag"))
    return np.asarray(real + 1j * imaginary)


def _trials(names: NDArray[np.str_], changes: NDArray[np.integer]) -> list[tuple[str, str]]:
    """By what the verdict was tried against, and whether it stood."""
    values = dict(zip(map(str, names), changes.tolist(), strict=True))
    tried = [name for name, value in values.items() if value >= 0]
    changed = [name for name, value in values.items() if value == 1]
    return [("tried with another", listed(tried)), ("changes with another", listed(changed) or "none")] if tried else []


def behaviour_section(view: StudyView, settings: ReportSettings) -> Section:
    """Of a study with verdicts; without them a section that has no figures."""
    figures: list[Drawn] = [*on_page(VERDICTS, view, settings)]
    if "verdict" in view.dataset and view.prompts:
        figures += prompts_panel(view, settings)
    return Section(
        anchor="behaviour",
        short="Behaviour",
        title="What do the tokens do in the long run?",
        lead=(
            f"The last states of each token, up to recurrence {view.second_horizon}, are judged by two methods: by the "
            "shape of their motion (displacement), and by their cosine to the last state (cosine), which is blind to "
            "the norm and to small motion. Lengths are relative to the norm of the state."
        ),
        figures=figures,
    )
