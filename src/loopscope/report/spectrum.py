"""Figures: the tokens' leading eigenvalues, how far they are from 1, and what damping does to them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loopscope.answers.wording import significant
from loopscope.predictions import token_eigenvalues
from loopscope.report.axes import lines_across, mark_vertical
from loopscope.report.figure import Figure, plot_text
from loopscope.report.material import Material
from loopscope.report.predicted_kinds import PREDICTED_LOOKS
from loopscope.report.style import INK, base_figure
from loopscope.spectra import PREDICTED_KINDS, Kind, damped, spectral_radius

__all__ = ["damping_figure", "drawn_note", "drawn_tokens", "radii_figure", "spectrum_figure", "token_labels"]

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
