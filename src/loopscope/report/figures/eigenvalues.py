"""Figures: the tokens' leading eigenvalues, how far they are from 1, and what damping does to them."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from loopscope._util.wording import percent, significant
from loopscope.answers.predictions import EXPECTED, agreement, prediction_table, rate_pairs, token_eigenvalues
from loopscope.dynamics.prediction import PREDICTED_KINDS, damped, spectral_radius
from loopscope.dynamics.prediction import PredictedKind as Kind
from loopscope.dynamics.verdicts import KINDS
from loopscope.report.figures._old import Figure, Material, base_figure, lines_across, mark_vertical, plot_text
from loopscope.report.figures.look import INK, KIND_LOOKS, MUTED, PREDICTED_LOOKS, SEQUENTIAL, kind_label
from loopscope.report.figures.plot import Section

_MOST_POINTS = 2_000
"""Of more tokens a random choice is drawn, always the same: a figure of more is heavy, and looks no different."""
_ETAS = np.linspace(0.02, 1, 50)


def spectrum_figure(material: Material) -> Figure:
    """Leading eigenvalues in the complex plane."""
    eigenvalues, kinds, prompt, token = _leading(material)
    shown = drawn_tokens(eigenvalues.size)
    figure = base_figure("real part", "imaginary part", hovermode="closest")
    angle = np.linspace(0, 2 * np.pi, 200)
    figure.add_scatter(
        x=np.cos(angle),
        y=np.sin(angle),
        mode="lines",
        line={"color": INK, "width": 1},
        name="modulus 1",
        hoverinfo="skip",
    )
    for place, kind in enumerate(PREDICTED_KINDS):
        of_kind = shown[kinds[shown] == place]
        if not of_kind.size:
            continue
        colour, symbol = PREDICTED_LOOKS[kind]
        values = eigenvalues[of_kind]
        labels = token_labels(material, prompt[of_kind], token[of_kind])
        figure.add_scatter(
            x=np.concatenate([values.real, values.real]),
            y=np.concatenate([values.imag, -values.imag]),
            mode="markers",
            name=str(kind),
            marker={"size": 6, "opacity": 0.6, "color": colour, "symbol": symbol},
            customdata=np.concatenate([np.abs(values), np.abs(values)]),
            text=[*labels, *labels],
            hovertemplate="%{text}: %{x:.3f} %{y:+.3f}i, modulus %{customdata:.3f}<extra></extra>",
        )
    figure.update_yaxes(scaleanchor="x")
    return Figure(
        anchor="stability-spectrum",
        title="Where do the leading eigenvalues lie?",
        caption=(
            "Each token's own eigenvalue of largest modulus, with its conjugate. Inside the circle the point attracts; "
            "to the right of it, the state moves away in one direction, to the left it jumps to and fro, elsewhere "
            "it turns. The colour is what is predicted, which is that of the slowest token up to it."
            + drawn_note(eigenvalues.size)
        ),
        plot=figure,
        height=420,
    )


def radii_figure(material: Material) -> Figure:
    radius = spectral_radius(_at_fixed_points(material))
    figure = base_figure("largest modulus of the token's eigenvalues", "tokens", hovermode="closest", bargap=0.05)
    if radius.size:
        low, high = min(0.0, float(radius.min())), max(1.05, float(radius.max()) * 1.02)
        counts, edges = np.histogram(radius, bins=50, range=(low, high))
        figure.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            width=np.diff(edges) * 0.95,
            marker={"color": "#0072B2"},
            customdata=np.stack([edges[:-1], edges[1:]], axis=-1),
            hovertemplate="%{y} tokens between %{customdata[0]:.3f} and %{customdata[1]:.3f}<extra></extra>",
            showlegend=False,
        )
        mark_vertical(figure, 1, "stability lost")
    return Figure(
        anchor="stability-radii",
        title="How far are the tokens from where stability is lost?",
        caption="The spectral radius of each token that stands at a fixed point, its own alone. The distance to 1 is "
        "what it may grow by before the point no longer attracts.",
        plot=figure,
        height=340,
    )


def damping_figure(material: Material) -> Figure:
    """The damped loop's radius for every step size, over the tokens."""
    values = _at_fixed_points(material)
    figure = base_figure("step η of the damped loop", "largest modulus", hovermode="x unified")
    best = ""
    if values.size:
        radii = np.stack([spectral_radius(damped(values, float(eta))) for eta in _ETAS])
        largest = radii.max(1)
        for name, level, colour in (("median token", 50, "#0072B2"), ("95 % of the tokens are below", 95, "#56B4E9")):
            figure.add_scatter(
                x=_ETAS,
                y=np.percentile(radii, level, axis=1),
                name=name,
                mode="lines",
                line={"color": colour, "width": 2},
                hovertemplate="%{y:.3f}",
            )
        figure.add_scatter(
            x=_ETAS,
            y=largest,
            name="slowest token",
            mode="lines",
            line={"color": "#D55E00", "width": 2},
            hovertemplate="%{y:.3f}",
        )
        lines_across(figure, {"color": INK, "width": 1}, y=[1])
        place = int(largest.argmin())
        best = (
            f" The slowest token is fastest at η = {_ETAS[place]:.2f}, with {significant(float(largest[place]), 3)}."
            if largest[place] < 1
            else " No step makes every token stable: an eigenvalue moves along a line through 1, and one to the right "
            "of it stays outside."
        )
    return Figure(
        anchor="stability-damping",
        title="What would damping the loop change?",
        caption=(
            "With s ← (1 - η) s + η F(s) an eigenvalue λ becomes 1 - η + η λ; at η = 1 stands the loop as it was run."
            + best
        ),
        plot=figure,
        height=340,
    )


def _at_fixed_points(material: Material) -> NDArray[np.complex128]:
    """Eigenvalues of the tokens at whose point there is a fixed point, (token, pair)."""
    data = material.view.dataset
    values = token_eigenvalues(data)
    kinds = data["predicted_kind"].transpose("prompt", "token").values
    found: NDArray[np.complex128] = values[np.isfinite(values).any(-1) & (kinds != PREDICTED_KINDS.index(Kind.FAR))]
    return found


def _leading(
    material: Material,
) -> tuple[NDArray[np.complex128], NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]:
    """Of each token that has eigenvalues: the leading one, what is predicted, prompt and token."""
    data = material.view.dataset
    values = token_eigenvalues(data)[..., 0]
    prompt, token = np.nonzero(np.isfinite(values))
    kinds = data["predicted_kind"].transpose("prompt", "token").values
    return values[prompt, token], kinds[prompt, token], prompt, token


def token_labels(material: Material, prompts: NDArray[np.int64], tokens: NDArray[np.int64]) -> list[str]:
    strings = [material.tokens[prompt]["token_strings"] for prompt in range(len(material.tokens))]
    return [
        f"prompt {prompt}, token {token} “{plot_text(str(strings[prompt][token]), 16)}”"
        for prompt, token in zip(prompts.tolist(), tokens.tolist(), strict=True)
    ]


def drawn_tokens(count: int) -> NDArray[np.int64]:
    """Which of so many are drawn."""
    if count <= _MOST_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, _MOST_POINTS, replace=False))


def drawn_note(count: int) -> str:
    return f" {_MOST_POINTS:,} of {count:,} tokens are drawn, chosen at random." if count > _MOST_POINTS else ""


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
