"""The tokens' leading eigenvalues: what they predict beside what is observed, how far they are from 1, and what damping
does to them."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopscope._util.wording import percent, plural, significant, visible
from loopscope.answers.predictions import (
    EXPECTED,
    agreement,
    prediction_table,
    rate_pairs,
    token_eigenvalues,
    untaken_tokens,
)
from loopscope.dynamics.prediction import PREDICTED_KINDS, damped, spectral_radius
from loopscope.dynamics.prediction import PredictedKind as Kind
from loopscope.dynamics.verdicts import KINDS
from loopscope.report.figures.look import CATEGORIES, INK, KIND_LOOKS, MUTED, PREDICTED_LOOKS, Symbol, kind_label
from loopscope.report.figures.plot import (
    Axis,
    Bars,
    Dots,
    FigureType,
    Frame,
    HeatMap,
    Line,
    Mark,
    Panel,
    Plot,
    Rule,
    Section,
    on_page,
)
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_MOST_POINTS = 2_000
"""Of more tokens a random choice is drawn, always the same: a figure of more is heavy, and looks no different."""
_ETAS = np.linspace(0.02, 1, 50)
_POINT = 6
"""CSS pixels of a token, which are drawn lighter where few lie on top of each other."""
_OPACITY = 0.6
_NAME = 12
"""Characters of a line of a kind's name along an axis."""
_PREDICTED = {place: (str(kind), *PREDICTED_LOOKS[kind]) for place, kind in enumerate(PREDICTED_KINDS)}


def _rates(view: StudyView, settings: ReportSettings) -> Plot:
    pairs = rate_pairs(view.dataset)
    shown = _drawn_tokens(pairs.predicted.size)
    both = np.concatenate([pairs.predicted, pairs.observed])
    span = max(0.0, float(both.min()) - 0.05), min(float(both.max()) + 0.05, 1.1)
    marks: list[Mark] = [Line(x=span, y=span, name="equal", colour=MUTED, width=1, dash="dash")]
    where = pairs.prompt[shown], pairs.token[shown]
    looks: list[tuple[str, str, Symbol]] = [
        *((kind_label(kind), KIND_LOOKS[kind].colour, KIND_LOOKS[kind].symbol) for kind in KINDS),
        ("not judged", MUTED, "circle"),
    ]
    order = [-1, *range(len(KINDS))]
    marks += _dots(
        view, where, (pairs.predicted[shown], pairs.observed[shown]), _verdicts(view)[where],
        {code: looks[code] for code in order}, "{label}: predicted {x:.3f}, observed {y:.3f}",
    )  # fmt: skip
    return Plot(
        question="Do the eigenvalues predict how fast tokens settle?",
        reading=(
            f"One point for each of {pairs.predicted.size:,} tokens that are predicted to settle and whose steps show "
            "a rate. Predicted: the largest modulus among the token and those before it, since it settles no faster "
            "than they do. Observed: the factor between the lengths of successive steps. On the dashed line the two "
            "are equal. Colours are the tokens' verdicts. The median difference is "
            f" {significant(pairs.median_difference)}.{_drawn_note(pairs.predicted.size)}"
        ),
        panels=[
            Panel(
                x=Axis(title="predicted rate per recurrence", span=span),
                y=Axis(title="observed rate per recurrence"),
                marks=marks,
                height=340,
            )
        ],
    )


def _no_rates(view: StudyView) -> str | None:
    some = rate_pairs(view.dataset).predicted.size
    return None if some else "no token has both a predicted rate below 1 and an observed rate"


def _verdicts(view: StudyView) -> NDArray[np.integer]:
    """(prompt, token); -1 where none was judged."""
    data = view.dataset
    if "verdict" not in data:
        return np.full((data.sizes["prompt"], data.sizes["token"]), -1)
    return np.asarray(data["verdict"].isel(judged_layer=-1).transpose("prompt", "token"))


def _kinds(view: StudyView) -> NDArray[np.integer]:
    """Places in `PREDICTED_KINDS`, (prompt, token)."""
    return np.asarray(view.dataset["predicted_kind"].transpose("prompt", "token"))


def _dots(
    view: StudyView,
    where: tuple[NDArray[np.int64], NDArray[np.int64]],
    points: tuple[NDArray[Any], NDArray[Any]],
    codes: NDArray[np.integer],
    looks: Mapping[int, tuple[str, str, Symbol]],
    tip: str,
    data: NDArray[Any] | None = None,
) -> list[Mark]:
    """Tokens, by prompt and token: those of one code in one colour. `points` are x and y, (token,), or (point, token)
    where a token has several; so is `data`. `looks` have name, colour and symbol."""
    marks: list[Mark] = []
    x, y = np.atleast_2d(*points)
    for code, (name, colour, symbol) in looks.items():
        of_code = codes == code
        if of_code.any():
            marks.append(
                Dots(
                    x=x[:, of_code].ravel(),
                    y=y[:, of_code].ravel(),
                    name=name,
                    colour=colour,
                    symbol=symbol,
                    size=_POINT,
                    opacity=_OPACITY,
                    labels=len(x) * _labels(view, where[0][of_code], where[1][of_code]),
                    data=None if data is None else data[:, of_code].reshape(-1, 1).astype(np.float32),
                    tip=tip,
                )
            )
    return marks


def _spectrum(view: StudyView, settings: ReportSettings) -> Plot:
    """Leading eigenvalues in the complex plane."""
    leading = token_eigenvalues(view.dataset)[..., 0]
    where = _some(np.isfinite(leading))
    values = leading[where]
    angle = np.linspace(0, 2 * np.pi, 200)
    marks: list[Mark] = [Line(x=np.cos(angle), y=np.sin(angle), name="modulus 1", colour=INK, width=1, tip="modulus 1")]
    marks += _dots(
        view, where, (np.stack([values.real] * 2), np.stack([values.imag, -values.imag])), _kinds(view)[where],
        _PREDICTED, "{label}: {x:.3f} {y:+.3f}i, modulus {0:.3f}", np.abs(np.stack([values] * 2)),
    )  # fmt: skip
    return Plot(
        question="Where do the leading eigenvalues lie?",
        reading=(
            "Each token's own eigenvalue of largest modulus, with its complex conjugate. Inside the circle the fixed "
            "point attracts. Outside it the state moves away: in one direction on the right, alternating on the left, "
            "rotating elsewhere. Colours are the predictions, in which the slowest token so far decides."
            + _drawn_note(int(np.isfinite(leading).sum()))
        ),
        panels=[
            Panel(
                x=Axis(title="real part"), y=Axis(title="imaginary part"), marks=marks, height=340, equal=True
            )
        ],
    )  # fmt: skip


def _drawn_tokens(count: int) -> NDArray[np.int64]:
    """Which of that many are drawn."""
    if count <= _MOST_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, _MOST_POINTS, replace=False))


def _some(there: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt and token of those that are drawn."""
    prompt, token = np.nonzero(there)
    drawn = _drawn_tokens(prompt.size)
    return prompt[drawn], token[drawn]


def _drawn_note(count: int) -> str:
    return f" {_MOST_POINTS:,} of {count:,} tokens are drawn, chosen at random." if count > _MOST_POINTS else ""


def _labels(view: StudyView, prompts: NDArray[np.int64], tokens: NDArray[np.int64]) -> list[str]:
    strings = [view.strings(prompt) for prompt in range(view.prompts)]
    return [
        f"prompt {prompt}, token {token} “{visible(strings[prompt][token], 16)}”"
        for prompt, token in zip(prompts.tolist(), tokens.tolist(), strict=True)
    ]


def _agreement(view: StudyView, settings: ReportSettings) -> Plot:
    """Predicted kind by verdict."""
    table = prediction_table(view.dataset)
    rows, columns = np.flatnonzero(table.any(1)), np.flatnonzero(table.any(0))
    shown = table[np.ix_(rows, columns)]
    share = shown / shown.sum(1, keepdims=True)
    tips = [
        [
            f"{count:,} tokens: predicted {PREDICTED_KINDS[row]}, judged {KINDS[column]} ({percent(part)} of the row)"
            for count, part, column in zip(counts, parts, columns, strict=True)
        ]
        for counts, parts, row in zip(shown.tolist(), share.tolist(), rows, strict=True)
    ]
    frames = [
        Frame(x=x, y=y)
        for y, row in enumerate(rows)
        for x, column in enumerate(columns)
        if KINDS[column] in EXPECTED.get(PREDICTED_KINDS[row], ())
    ]
    found = agreement(table)
    return Plot(
        question="Do the verdicts confirm the predictions?",
        reading=(
            "Tokens by the prediction of their eigenvalues and the verdict on their trajectory. In framed cells the "
            f"two agree: {found.agree:,} tokens; {found.disagree:,} disagree, and for {found.open:,} one of the two is "
            "undecided. The colour is the share of the row, on a square-root scale."
        ),
        panels=[
            Panel(
                x=Axis(
                    title="verdict",
                    ticks={x: fill(str(KINDS[column]), _NAME) for x, column in enumerate(columns)},
                ),
                y=Axis(
                    title="predicted",
                    ticks={y: fill(str(PREDICTED_KINDS[row]), _NAME) for y, row in enumerate(rows)},
                    span=(len(rows) - 0.5, -0.5),
                ),
                marks=[
                    HeatMap(
                        z=np.sqrt(share),
                        x=range(len(columns)),
                        bar="",
                        low=0,
                        high=1,
                        texts=[[f"{count:,}" if count else "" for count in row] for row in shown.tolist()],
                        gaps=True,
                        labels=tips,
                        tip="{label}",
                    ),
                    *frames,
                ],
                height=max(260, 150 + 44 * len(rows)),
            )
        ],
    )


def _radii(view: StudyView, settings: ReportSettings) -> Plot:
    radius = spectral_radius(_at_fixed_points(view))
    low, high = min(0.0, float(radius.min())), max(1.05, float(radius.max()) * 1.02)
    counts, edges = np.histogram(radius, bins=50, range=(low, high))
    return Plot(
        question="How far are the tokens from where stability is lost?",
        reading="The spectral radius of each token that stands at a fixed point, from its own eigenvalues alone. Its "
        "distance to 1 is how much it may grow before the point no longer attracts.",
        panels=[
            Panel(
                x=Axis(title="largest modulus of the token's eigenvalues"),
                y=Axis(title="tokens"),
                marks=[
                    Bars(
                        x=(edges[:-1] + edges[1:]) / 2,
                        y=counts,
                        width=float(edges[1] - edges[0]) * 0.95,
                        colour=CATEGORIES[0],
                        data=np.stack([edges[:-1], edges[1:]], axis=-1).astype(np.float32),
                        tip="{y} tokens between {0:.3f} and {1:.3f}",
                    ),
                    Rule(x=1.0, name="stability lost", above=True),
                ],
            )
        ],
    )


def _growth(view: StudyView, settings: ReportSettings) -> Plot:
    """What disturbances grow to, beside the radius that rules in the end."""
    radius = spectral_radius(token_eigenvalues(view.dataset))
    growth = view.dataset["transient_growth"].transpose("prompt", "token").values
    there = np.isfinite(growth) & (radius < 1)
    where = _some(there)
    tip = "{label}: radius {x:.3f}, growth {y:.2f}"
    marks = _dots(view, where, (radius[where], growth[where]), _kinds(view)[where], _PREDICTED, tip)
    marks.append(Rule(y=1.0, name="no growth", dash="dot"))
    return Plot(
        question="Do small disturbances grow before they shrink?",
        reading=(
            "One point for each token whose own spectral radius is below 1, with the largest factor by which a "
            "disturbance of its state was found to grow after 1, 2, 4, ... recurrences (a lower bound). Every "
            "disturbance dies out in the end; where the factor is above 1, some grow first. A normal matrix would have "
            "no growth. Colours are the predictions, in which the slowest token so far decides."
            f"{_drawn_note(int(there.sum()))}"
        ),
        panels=[
            Panel(
                x=Axis(title="largest modulus of the token's eigenvalues"),
                y=Axis(title="largest growth", scale="auto"),
                marks=marks,
                height=340,
            )
        ],
    )


def _damping(view: StudyView, settings: ReportSettings) -> Plot:
    """The damped loop's radius for every step size, over the tokens."""
    values = _at_fixed_points(view)
    radii = np.stack([spectral_radius(damped(values, float(eta))) for eta in _ETAS])
    largest = radii.max(1)
    place = int(largest.argmin())
    best = (
        f"The slowest token settles fastest at η = {_ETAS[place]:.2f}, with modulus "
        f"{significant(float(largest[place]), 3)}."
        if largest[place] < 1
        else "No step makes every token stable: damping moves an eigenvalue along a line through 1, and one to the "
        "right of 1 stays there."
    )
    lines = (
        ("median token", np.median(radii, axis=1), CATEGORIES[0]),
        ("95th percentile of the tokens", np.percentile(radii, 95, axis=1), CATEGORIES[5]),
        ("slowest token", largest, CATEGORIES[3]),
    )
    return Plot(
        question="What would damping the loop change?",
        reading=(
            f"With s ← (1 − η) s + η F(s) an eigenvalue λ becomes 1 − η + η λ; η = 1 is the loop as it was run. {best}"
        ),
        panels=[
            Panel(
                x=Axis(title="step η of the damped loop"),
                y=Axis(title="largest modulus"),
                marks=[
                    *(Line(x=_ETAS, y=y, name=name, colour=colour) for name, y, colour in lines),
                    Rule(y=1.0, name="stability lost", dash="dot"),
                ],
            )
        ],
    )


def _at_fixed_points(view: StudyView) -> NDArray[np.complex128]:
    """Eigenvalues of the tokens at whose point there is a fixed point, (token, pair)."""
    values = token_eigenvalues(view.dataset)
    known = np.isfinite(values).any(-1)
    return np.asarray(values[known & (_kinds(view) != PREDICTED_KINDS.index(Kind.FAR))])


def _no_growth(view: StudyView) -> str | None:
    there = np.isfinite(view.dataset["transient_growth"].transpose("prompt", "token").values)
    return (
        None if (spectral_radius(token_eigenvalues(view.dataset))[there] < 1).any() else "no token's radius is below 1"
    )


def _no_fixed_point(view: StudyView) -> str | None:
    return None if len(_at_fixed_points(view)) else "no token stands at a fixed point"


def _no_damping(view: StudyView) -> str | None:
    return "eigenvalues were taken of some tokens only" if untaken_tokens(view.dataset) else _no_fixed_point(view)


def _no_table(view: StudyView) -> str | None:
    return None if prediction_table(view.dataset).any() else "no token has both a prediction and a verdict"


def _all_agree(view: StudyView) -> str | None:
    found = agreement(prediction_table(view.dataset))
    if found.disagree or found.open:
        return None
    return f"The verdicts confirm the predictions of all {plural(found.agree, 'token')}."


_EIGENVALUES = ("eigenvalue_real", "eigenvalue_imag", "predicted_kind")
STABILITY = (
    FigureType("stability-rates", _rates, ("predicted_rate", "observed_rate"), unless=_no_rates),
    FigureType("stability-spectrum", _spectrum, _EIGENVALUES),
    FigureType("stability-agreement", _agreement, ("predicted_kind", "verdict"), said=_all_agree, unless=_no_table),
    FigureType("stability-radii", _radii, _EIGENVALUES, folded=True, unless=_no_fixed_point),
    FigureType("stability-growth", _growth, ("transient_growth", *_EIGENVALUES), folded=True, unless=_no_growth),
    FigureType("stability-damping", _damping, _EIGENVALUES, folded=True, unless=_no_damping),
)


def stability_section(view: StudyView, settings: ReportSettings) -> Section:
    """Of a study with eigenvalues; without them a section that has no figures."""
    return Section(
        anchor="stability",
        short="Stability",
        title="Why: are the fixed points stable?",
        lead=(
            "Eigenvalues of one recurrence as a map of a single token's state, with earlier tokens held fixed; taken "
            f"where the state stands after {view.second_horizon} recurrences, or at the fixed point that a search "
            "found from there. With all moduli below 1 the state returns to the point, at the rate of the largest; a "
            "complex pair makes it rotate on its way."
        ),
        figures=on_page(STABILITY, view, settings),
    )
