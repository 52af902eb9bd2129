"""Section: what the tokens tend to, how sure that is, and what single tokens do."""

from __future__ import annotations

import xarray

from loopscope.rates import co_occurrence, study_rates, token_shares
from loopscope.report.behaviour_tokens import extreme_figures, prompts_panel
from loopscope.report.figure import Drawn, Figure, Section
from loopscope.report.kind_maps import co_occurrence_map, sensitivity_map, share_map
from loopscope.report.kind_shares import ShareSeries, shares_figure
from loopscope.report.material import Material
from loopscope.study import Study

__all__ = ["behaviour_section"]


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
