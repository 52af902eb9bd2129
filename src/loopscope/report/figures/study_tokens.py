"""A study's tokens for the panel: which prompts are shown, what is said of each token, and the extreme ones."""

from __future__ import annotations

import math

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import listed, percent, significant, visible
from loopscope.answers.rates import co_occurrence, study_rates, token_shares
from loopscope.dynamics.prediction import PREDICTED_KINDS
from loopscope.dynamics.prediction import PredictedKind as Predicted
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.report.figures._old import Figure, Material
from loopscope.report.figures.plot import Drawn, Section
from loopscope.report.figures.token_panel import FACTS, PanelGroup, PanelToken, TokenPanel, facts_of, token_panel
from loopscope.report.figures.verdicts import (
    Extreme,
    ShareSeries,
    co_occurrence_map,
    extremes,
    sensitivity_map,
    share_map,
    shares_figure,
)
from loopscope.study import Study

_PROMPTS = 4
"""Prompts in the page unless the settings name some: with 200 tokens each they take half a MB."""
_TOKENS = 200
"""Of a longer prompt, the last so many."""
_MOVING = (Kind.ORBIT, Kind.SLIDER, Kind.BOUNDED, Kind.DIVERGING)
_TURNING = (Predicted.DAMPED_ROTATION, Predicted.ORBIT, Predicted.PERIOD_TWO)
_SIZE = {Kind.ORBIT: "verdict_amplitude", Kind.SLIDER: "verdict_speed"}


def prompts_panel(material: Material) -> list[TokenPanel]:
    """The tokens of some prompts, after the last recurrent layer."""
    data = _last_layer(material)
    chosen = list(material.settings.prompts) or _interesting(data)
    if not chosen:
        return []
    groups = [_group(material, data, prompt) for prompt in chosen]
    return [
        token_panel(
            groups,
            title="Token by token: what does each one do?",
            caption=(
                f"After recurrent layer {int(data['judged_layer'])}. Pick a token, with the mouse or the arrow keys, "
                "to see its way and its displacement: level for an orbit or for noise, rising in proportion to the lag "
                "for a slider. The prompts shown are those with the rarest kinds, unless some were asked for."
            ),
            choose="Prompt",
        )
    ]


def extreme_figures(material: Material) -> list[Figure]:
    """The widest orbit and the fastest slider of the last layer."""
    data = _last_layer(material)
    if "tail_path" not in data:
        return []
    codes = data["verdict"].values
    candidates = []
    for kind, name in _SIZE.items():
        for prompt, token in np.argwhere(codes == KINDS.index(kind)):
            place = {"prompt": int(prompt), "token": int(token)}
            candidates.append(
                Extreme(
                    label=f"Prompt {prompt}, token {token} “{_strings(material, int(prompt))[token]}”",
                    kind=kind,
                    size=float(data[name].isel(place)),
                    period=float(data["verdict_period"].isel(place)),
                    path=_path(data, place),
                )
            )
    return extremes(candidates)


def verdict_line(kind: Kind, numbers: dict[str, float]) -> str:
    """What decided, from the numbers that a study keeps; a length is a share of the norm."""
    level, floor = numbers["level"], numbers["floor"]
    moves = f"it still moves by {percent(level)} of its norm" if math.isfinite(level) else ""
    if moves and floor > 0:
        moves += f", {significant(level / floor)} times the noise floor"
    special = {
        Kind.ORBIT: _said("It comes round every {} recurrences", numbers["period"])
        + _said(", at {} of its norm from the centre", numbers["amplitude"], percent),
        Kind.SLIDER: _said("It moves on by {} of its norm per recurrence", numbers["speed"], percent),
        Kind.FIXED_POINT: _said("Its distance to the limit shrinks by a factor of {} per recurrence", numbers["rate"]),
        Kind.DIVERGING: _said("Its distance grows by a factor of {} per recurrence", numbers["rate"]),
    }.get(kind, "")
    parts = [part for part in (special, moves) if part]
    if not parts:
        return "The study keeps no number that says why." if kind is not Kind.DIVERGING else "It is no longer finite."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _said(sentence: str, value: float, shown: object = significant) -> str:
    assert callable(shown)
    return sentence.format(shown(value)) if math.isfinite(value) else ""


def _last_layer(material: Material) -> xarray.Dataset:
    data = material.view.dataset.isel(judged_layer=-1)
    return data.transpose(..., "prompt", "token", missing_dims="ignore")


def _interesting(data: xarray.Dataset) -> list[int]:
    """Prompts that between them show the rarest kinds: for each kind the prompt with most of it, rarest kind first."""
    codes = data["verdict"].values
    counts = np.stack([(codes == place).sum(-1) for place in range(len(KINDS))])
    order = np.argsort(counts.sum(-1), kind="stable")
    found = [int(counts[place].argmax()) for place in order if counts[place].any()]
    return list(dict.fromkeys([*found, *range(codes.shape[0])]))[:_PROMPTS]


def _group(material: Material, data: xarray.Dataset, prompt: int) -> PanelGroup:
    strings = _strings(material, prompt)
    first = max(0, len(strings) - _TOKENS)
    here = data.isel(prompt=prompt)
    tokens = [_token(here, place, strings[place]) for place in range(first, len(strings))]
    entry = material.tokens[prompt]
    text = str(entry["text"] or "".join(strings))
    return PanelGroup(
        name=f"Prompt {prompt}: {visible(text, 70)}",
        tokens=tokens,
        first=first,
        start=_first_shown(tokens, here["verdict_level"].values[first : len(strings)]),
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


def _token(here: xarray.Dataset, place: int, string: str) -> PanelToken:
    code = int(here["verdict"].values[place])
    if code < 0:
        return PanelToken(label=string, kind=None, line="It was not judged.")
    kind = KINDS[code]
    numbers = {name: float(here[f"verdict_{name}"].values[place]) for name in FACTS}
    other = int(here["verdict_cosine"].values[place])
    facts = [("by the cosine method", str(KINDS[other]) if other >= 0 else "not judged")]
    return PanelToken(
        label=string,
        kind=kind,
        line=verdict_line(kind, numbers),
        facts=[
            *facts,
            *facts_of(numbers),
            *_trials(here["verdict_changes"].isel(token=place)),
            *_predicted(here, place),
        ],
        path=_path(here, {"token": place}) if "tail_path" in here else None,
        curve=here["displacement"].isel(token=place).values if "displacement" in here else None,
        floor=numbers["floor"],
        eigenvalues=_eigenvalues(here, place),
    )


def _predicted(here: xarray.Dataset, place: int) -> list[tuple[str, str]]:
    """What the token's eigenvalues and its steps say, where they were taken."""
    names = ["predicted_rate", "observed_rate"]
    found = []
    if "predicted_kind" in here:
        code = int(here["predicted_kind"].values[place])
        found.append(("predicted", str(PREDICTED_KINDS[code]) if code >= 0 else "nothing"))
        if code >= 0 and PREDICTED_KINDS[code] in _TURNING:
            names.append("predicted_period")
        if here["damping_needed"].values[place] < 1:
            names.append("damping_needed")
    for name in names:
        value = float(here[name].values[place]) if name in here else math.nan
        if math.isfinite(value):
            found.append((name.replace("_", " "), significant(value, 3)))
    return found


def _eigenvalues(here: xarray.Dataset, place: int) -> NDArray[np.complexfloating] | None:
    if "eigenvalue_real" not in here:
        return None
    one = here.isel(token=place)
    return np.asarray(one["eigenvalue_real"].values + 1j * one["eigenvalue_imag"].values)


def _trials(changes: xarray.DataArray) -> list[tuple[str, str]]:
    """By what the verdict was tried against, and whether it stood."""
    values = dict(zip(map(str, changes["change"].values), changes.values.tolist(), strict=True))
    tried = [name for name, value in values.items() if value >= 0]
    changed = [name for name, value in values.items() if value == 1]
    return [("tried against another", listed(tried)), ("changes with", listed(changed) or "none")] if tried else []


def _path(data: xarray.Dataset, place: dict[str, int]) -> NDArray[np.floating]:
    path: NDArray[np.floating] = data["tail_path"].isel(place).transpose("tail", "plane").values
    return path


def _strings(material: Material, prompt: int) -> list[str]:
    return [str(token) for token in material.tokens[prompt]["token_strings"]]


def behaviour_section(study: Study, material: Material) -> Section:
    """Of a study with verdicts; without them a section that has no figures."""
    data = material.view.dataset
    figures: list[Drawn] = []
    if "verdict" in data and data.sizes["prompt"]:
        figures = [
            _shares(study),
            *_by_layer(data),
            _by_role(study),
            *_sensitivities(study),
            *_layers_together(study),
            *extreme_figures(material),
            *prompts_panel(material),
        ]
    horizon = material.view.horizon
    return Section(
        anchor="behaviour",
        short="Behaviour",
        title="What do the tokens tend to?",
        lead=(
            f"Each token's last states of {2 * horizon} recurrences, judged by the shape of their motion "
            "(displacement) and by their cosine to the last state (cosine). The cosine is blind to the norm and to "
            "small motion. Lengths are relative to the norm of the state."
        ),
        figures=figures,
    )


def _shares(study: Study) -> Figure:
    found = {method: study_rates(study, method=method) for method in ("displacement", "cosine")}
    series = [
        ShareSeries(name=f"{things}, {method}", shares=shares, square=things == "prompts", hollow=method == "cosine")
        for things in ("tokens", "prompts")
        for method, rates in found.items()
        for shares in (rates.tokens if things == "tokens" else rates.prompts,)
    ]
    layer = found["displacement"].layer
    return shares_figure(
        series,
        f"After recurrent layer {layer}. Bars are 95 % Clopper-Pearson intervals; a triangle stands at the highest "
        "share that the interval leaves possible where none was found. A prompt counts for every kind that one of its "
        "tokens has. The tokens of a prompt depend on each other, so their intervals are too narrow; those of prompts "
        "are not.",
    )


def _by_layer(data: xarray.Dataset) -> list[Figure]:
    layers = [int(layer) for layer in data["judged_layer"].values]
    if len(layers) < 2:
        return []
    codes = data["verdict"].transpose("judged_layer", "prompt", "token").values
    return [
        share_map(
            {str(layer): token_shares(one[one >= 0]) for layer, one in zip(layers, codes, strict=True)},
            anchor="behaviour-layers",
            title="Is it the same at every layer?",
            caption="Percent of the tokens, by displacement; the colours are even in the square root. Point at a cell "
            "for the count and its interval.",
            x_title="recurrent layer",
        )
    ]


def _by_role(study: Study) -> Figure:
    rates = study_rates(study)
    return share_map(
        {name: shares for name, shares in rates.roles.items() if shares[0].total},
        anchor="behaviour-roles",
        title="Does it depend on what the token is?",
        caption=f"Percent of the tokens of each role after recurrent layer {rates.layer}, by displacement. A token can "
        "have several roles: the question is what lies between a system prompt and what a chat template adds.",
        x_title="",
    )


def _sensitivities(study: Study) -> list[Figure]:
    """Maps of both methods, all prompts together."""
    data, record = study.dataset, study.manifest.get("behaviour") or {}
    figures = []
    for method in ("displacement", "cosine"):
        name = f"{method}_sensitivity"
        if name not in data or method not in record:
            continue
        names = [str(each) for each in record["sensitivity"][method]]
        counts = data[name].sum("prompt").transpose(f"{method}_setting", f"{method}_setting_other", "kind")
        if counts.values.sum():
            figures.append(sensitivity_map(counts, names, [float(record[method][each]) for each in names], method))
    return figures


def _layers_together(study: Study) -> list[Figure]:
    if study.dataset.sizes["judged_layer"] < 2:
        return []
    figure = co_occurrence_map(
        co_occurrence(study),
        "Of the tokens that show the kind of a row at some layer, the share that shows the kind of the column at some "
        "layer. The row of a rare kind tells what other layers show of the tokens that have it.",
    )
    return [] if figure is None else [figure]
