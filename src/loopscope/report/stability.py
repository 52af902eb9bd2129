"""Section: why tokens settle or not, from the eigenvalues of one recurrence."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from loopscope.answers.wording import percent, significant
from loopscope.predictions import EXPECTED, agreement, prediction_table, rate_pairs
from loopscope.report.figure import Figure, Section
from loopscope.report.kinds import KIND_LOOKS, kind_label
from loopscope.report.material import Material
from loopscope.report.spectrum import (
    damping_figure,
    drawn_note,
    drawn_tokens,
    radii_figure,
    spectrum_figure,
    token_labels,
)
from loopscope.report.style import MUTED, SEQUENTIAL, base_figure
from loopscope.spectra import PREDICTED_KINDS
from loopscope.verdicts import KINDS

__all__ = ["stability_section"]


def stability_section(material: Material) -> Section:
    """Of a study with eigenvalues; without them a section that has no figures."""
    data = material.view.dataset
    figures: list[Figure] = []
    if "predicted_kind" in data and data.sizes["prompt"]:
        figures = [
            _rates(material),
            spectrum_figure(material),
            *_table(material),
            radii_figure(material),
            damping_figure(material),
        ]
    return Section(
        anchor="stability",
        short="Stability",
        title="Why: are the fixed points stable?",
        lead=(
            "The eigenvalues of one recurrence, as a map of one token's state with the tokens before it held still, "
            f"where the state stands after {2 * material.view.horizon} recurrences, or at the fixed point that a "
            "search found from there. Below 1 in modulus, the state returns to the point at that rate; a complex pair "
            "turns on its way."
        ),
        figures=figures,
    )


def _rates(material: Material) -> Figure:
    pairs = rate_pairs(material.view.dataset)
    shown = drawn_tokens(pairs.predicted.size)
    figure = base_figure("predicted rate per recurrence", "observed rate per recurrence", hovermode="closest")
    if pairs.predicted.size:
        both = np.concatenate([pairs.predicted, pairs.observed])
        low, high = max(0.0, float(both.min()) - 0.05), min(float(both.max()) + 0.05, 1.1)
        figure.add_scatter(
            x=[low, high],
            y=[low, high],
            mode="lines",
            line={"color": MUTED, "width": 1, "dash": "dash"},
            name="equal",
            hoverinfo="skip",
        )
        figure.update_xaxes(range=[low, high])
    codes = _verdicts(material)
    prompt, token = pairs.prompt[shown], pairs.token[shown]
    for code in [-1, *range(len(KINDS))]:
        of_kind = codes[prompt, token] == code
        if not of_kind.any():
            continue
        look = None if code < 0 else KIND_LOOKS[KINDS[code]]
        figure.add_scatter(
            x=pairs.predicted[shown][of_kind],
            y=pairs.observed[shown][of_kind],
            mode="markers",
            name="not judged" if look is None else kind_label(KINDS[code]),
            marker={
                "size": 6,
                "opacity": 0.6,
                "color": MUTED if look is None else look.colour,
                "symbol": "circle" if look is None else look.symbol,
            },
            text=token_labels(material, prompt[of_kind], token[of_kind]),
            hovertemplate="%{text}: predicted %{x:.3f}, observed %{y:.3f}<extra></extra>",
        )
    return Figure(
        anchor="stability-rates",
        title="Do the eigenvalues predict how fast tokens settle?",
        caption=(
            f"A point for each of {pairs.predicted.size:,} tokens that settle by prediction and whose steps show a "
            "rate; on the line the two are equal. Predicted is the largest modulus of the token and those before it, "
            "which it follows; observed, the factor from one step's length to the next. The colour is its verdict. The "
            f"median difference is {significant(pairs.median_difference)}." + drawn_note(pairs.predicted.size)
        ),
        plot=figure,
        height=420,
    )


def _table(material: Material) -> list[Figure]:
    """Predicted kind by verdict; none without verdicts."""
    if "verdict" not in material.view.dataset:
        return []
    table = prediction_table(material.view.dataset)
    rows, columns = np.flatnonzero(table.any(1)), np.flatnonzero(table.any(0))
    if not rows.size:
        return []
    shown = table[np.ix_(rows, columns)]
    share = shown / shown.sum(1, keepdims=True)
    figure = base_figure("verdict", "predicted", hovermode="closest")
    figure.add_heatmap(
        z=np.sqrt(share),
        zmin=0,
        zmax=1,
        text=[[f"{count:,}" if count else "" for count in row] for row in shown],
        texttemplate="%{text}",
        textfont={"size": 12},
        customdata=[
            [
                f"{count:,} tokens: predicted {PREDICTED_KINDS[row]}, judged {KINDS[column]} "
                f"({percent(count / shown_row.sum())} of the row)"
                for count, column in zip(shown_row, columns, strict=True)
            ]
            for shown_row, row in zip(shown, rows, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=SEQUENTIAL,
        showscale=False,
        xgap=2,
        ygap=2,
    )
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if KINDS[column] in EXPECTED.get(PREDICTED_KINDS[row], ()):
                _frame(figure, x, y)
    figure.update_xaxes(
        tickvals=list(range(len(columns))),
        ticktext=[str(KINDS[column]).replace(" ", "<br>") for column in columns],
        tickangle=0,
        ticks="",
        showgrid=False,
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[str(PREDICTED_KINDS[row]) for row in rows],
        autorange="reversed",
        ticks="",
        showgrid=False,
    )
    found = agreement(table)
    return [
        Figure(
            anchor="stability-agreement",
            title="Do the verdicts bear the predictions out?",
            caption=(
                f"Tokens by what their eigenvalue predicts and what their trajectory was judged to do. Framed cells "
                f"agree: {found.agree:,} tokens; {found.disagree:,} disagree, and of {found.open:,} one of the two "
                "cannot be told. The colour is the share of the row, even in the square root."
            ),
            plot=figure,
            height=max(260, 150 + 44 * len(rows)),
        )
    ]


def _frame(figure: go.Figure, x: int, y: int) -> None:
    corners = {"x0": x - 0.47, "x1": x + 0.47, "y0": y - 0.47, "y1": y + 0.47}
    figure.add_shape(type="rect", line={"color": "#D55E00", "width": 2.5}, **corners)


def _verdicts(material: Material) -> NDArray[np.integer]:
    """(prompt, token); -1 where none was judged."""
    data = material.view.dataset
    if "verdict" not in data:
        return np.full((data.sizes["prompt"], data.sizes["token"]), -1)
    found: NDArray[np.integer] = data["verdict"].isel(judged_layer=-1).transpose("prompt", "token").values
    return found
