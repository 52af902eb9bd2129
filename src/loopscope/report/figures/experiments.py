"""Figures of experiments: small multiples of a grid, the phase diagram, the ranking of designs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from loopscope._util.wording import significant
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.experiments.cells import CellOutcome, CellResult, by_design
from loopscope.experiments.random_findings import Boundary, boundaries
from loopscope.experiments.sweep_cells import ControlName as Control
from loopscope.experiments.sweep_cells import SweepResult
from loopscope.experiments.sweep_findings import DesignSummary, control_results, summaries
from loopscope.report.figures._old import Figure, base_figure, lines_across, plot_text
from loopscope.report.figures.look import CATEGORIES, INK, KIND_LOOKS, MUTED, kind_label, ordered_colours
from loopscope.report.figures.plot import Section

_OUTCOMES: dict[CellOutcome, tuple[str, str]] = {
    CellOutcome.FIXED_POINT: ("#0072B2", "solid"),
    CellOutcome.DEGENERATE: ("#E69F00", "dash"),
    CellOutcome.DIRECTION: ("#CC79A7", "dashdot"),
    CellOutcome.NONE: ("#D55E00", "dot"),
    CellOutcome.CANNOT_TELL: ("#8A8F98", "longdash"),
}
"""Colour and dash of a curve."""
_FLOOR = 1e-8
"""Distances below are drawn there: float32 knows no smaller one."""
_ROW = 34
"""CSS pixels of a design in a ranking or a phase diagram."""
_CONTROLS: dict[Control, tuple[str, str]] = {
    "equal-depth": ("dash", "feed-forward, as deep"),
    "equal-parameters": ("dot", "feed-forward, as large"),
}


def architecture_section(cells: Sequence[CellResult]) -> Section:
    """The grid as small multiples: one per norm and injection, a curve a model."""
    figures = [
        _distances(norm, injection, group)
        for (norm, injection), group in by_design(cells, lambda cell: (cell.norm, cell.injection))
    ]
    return Section(
        anchor="architectures",
        short="Random models",
        title="Which norms and injections make fixed points?",
        lead="Each panel is a design, each curve a randomly initialised model: the distance of its states to those at "
        "the horizon, of the layer that is farthest. A curve that falls straight to the floor settles at a constant "
        "rate.",
        columns=3,
        figures=figures,
    )


def _distances(norm: str, injection: str, group: Sequence[CellResult]) -> Figure:
    figure = base_figure("recurrences", "relative distance", hovermode="closest")
    named: set[CellOutcome] = set()
    for each in group:
        colour, dash = _OUTCOMES[each.outcome]
        # The last one is the horizon itself, whose distance is zero.
        points = [
            (count, max(value, _FLOOR))
            for count, value in zip(each.counts[:-1], each.distance[:-1], strict=True)
            if value is not None
        ]
        figure.add_scatter(
            x=[count for count, _ in points],
            y=[value for _, value in points],
            mode="lines",
            name=str(each.outcome),
            legendgroup=str(each.outcome),
            showlegend=each.outcome not in named,
            line={"color": colour, "dash": dash, "width": 1.6},
            hovertemplate=f"{each.cell.depth} layers, seed {each.cell.seed}<br>after %{{x}}: %{{y:.2g}}<extra></extra>",
        )
        named.add(each.outcome)
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", range=[math.log10(_FLOOR) - 0.2, 0.7], dtick=2)
    outcomes = [str(each.outcome) for each in group]
    title = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes))
    return Figure(
        anchor=f"architectures-{norm}-{injection}",
        title=f"{norm}, injection {injection}: {title}",
        caption=f"{len(group)} models.",
        plot=figure,
        height=250,
    )


def phase_section(cells: Sequence[CellResult]) -> Section:
    """What tokens tend to over the scale of the weights, and where eigenvalues put the loss of stability."""
    found = boundaries(cells)
    figures = [_phase_map(found)]
    for (norm, injection), group in _by_injection_scale(found):
        figures.append(_two_scales(norm, injection, group))
    return Section(
        anchor="phase",
        short="Phase diagram",
        title="Up to which scale of the weights does a design settle?",
        lead="Tiles show what most tokens tend to. The black line is where the largest predicted rate crosses 1: to "
        "its left the fixed point attracts, as far as eigenvalues tell.",
        figures=[figure for figure in figures if figure.has_data],
    )


def _by_injection_scale(found: Sequence[Boundary]) -> list[tuple[tuple[str, str], list[Boundary]]]:
    """Designs that were run at several scales of the injection."""
    groups: dict[tuple[str, str], list[Boundary]] = {}
    for each in found:
        groups.setdefault((each.norm, each.injection), []).append(each)
    return [
        (key, sorted(group, key=lambda each: each.injection_scale)) for key, group in groups.items() if len(group) > 1
    ]


def _phase_map(found: Sequence[Boundary]) -> Figure:
    rows = [
        f"{each.norm}, {each.injection}" + (f" × {each.injection_scale:g}" if each.injection_scale != 1 else "")
        for each in found
    ]
    figure = _tiles(found, rows)
    _crossings(figure, found)
    return Figure(
        anchor="phase-map",
        title="What do tokens tend to, design by design?",
        caption="Numbers are the largest predicted rate of the tokens whose fixed point is known; no number: none is. "
        "Black lines: where that rate crosses 1, between two scales by their logarithm. Rings: where half of the "
        "tokens no longer settle.",
        plot=figure,
        height=150 + len(found) * _ROW,
    )


def _two_scales(norm: str, injection: str, group: Sequence[Boundary]) -> Figure:
    figure = _tiles(group, [f"{each.injection_scale:g}" for each in group])
    figure.update_yaxes(title={"text": "factor on the injection"})
    _crossings(figure, group, joined=True)
    return Figure(
        anchor=f"phase-{norm}-{injection}",
        title=f"{norm}, injection {injection}: weights against injection",
        caption="The black curve joins the scales at which the largest predicted rate crosses 1; rings are where half "
        "of the tokens no longer settle.",
        plot=figure,
        height=190 + len(group) * _ROW,
    )


def _tiles(found: Sequence[Boundary], rows: Sequence[str]) -> go.Figure:
    """A tile for each row and scale, coloured by the commonest kind, with its letter and the predicted rate."""
    figure = base_figure("standard deviation of the weights", "", hovermode="closest")
    scales = found[0].scales
    codes = [[KINDS.index(Kind(tends)) for tends in each.tends] for each in found]
    looks = [KIND_LOOKS[kind] for kind in KINDS]
    steps = [(place + end) / len(KINDS) for place in range(len(KINDS)) for end in (0, 1)]
    figure.add_heatmap(
        x=list(range(len(scales))),
        y=list(range(len(found))),
        z=codes,
        zmin=-0.5,
        zmax=len(KINDS) - 0.5,
        colorscale=[[at, looks[place // 2].colour] for place, at in enumerate(steps)],
        showscale=False,
        xgap=2,
        ygap=2,
        opacity=0.85,
        customdata=[
            [
                f"{name}, std {scale:g}<br>{tends}; {100 * settled:.0f} % of tokens settle<br>predicted rate "
                + ("unknown" if radius is None else significant(radius, 3))
                for scale, tends, settled, radius in zip(
                    each.scales, each.tends, each.settles, each.radius, strict=True
                )
            ]
            for name, each in zip(rows, found, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    for row, each in enumerate(found):
        for place, (tends, radius) in enumerate(zip(each.tends, each.radius, strict=True)):
            look = KIND_LOOKS[Kind(tends)]
            figure.add_annotation(
                x=place,
                y=row,
                text=look.letter if radius is None else f"{look.letter} {radius:.2f}",
                showarrow=False,
                font={"color": look.on_colour, "size": 11.5},
            )
    for kind in dict.fromkeys(Kind(tends) for each in found for tends in each.tends):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=kind_label(kind),
            marker={"symbol": "square", "size": 11, "color": KIND_LOOKS[kind].colour},
        )  # fmt: skip
    figure.update_xaxes(
        tickvals=list(range(len(scales))),
        ticktext=[f"{scale:g}" for scale in scales],
        range=[-0.5, len(scales) - 0.5],
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=list(rows), range=[len(rows) - 0.5, -0.5], ticks="", showgrid=False
    )
    return figure


def _crossings(figure: go.Figure, found: Sequence[Boundary], *, joined: bool = False) -> None:
    """Where predicted rates cross 1, as a line, and where tokens stop settling, as rings."""
    places = [_place(each.scales, each.predicted) for each in found]
    if joined:
        x: list[float | None] = list(places)
        y: list[float | None] = [float(row) for row in range(len(found))]
    else:
        x, y = [], []
        for row, place in enumerate(places):
            x += [place, place, None]
            y += [row - 0.5, row + 0.5, None]
    if any(place is not None for place in places):
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers" if joined else "lines",
            line={"color": INK, "width": 3.5},
            marker={"size": 7, "color": INK},
            name="predicted rate crosses 1",
            hoverinfo="skip",
        )
    observed = [_place(each.scales, each.observed) for each in found]
    if any(place is not None for place in observed):
        figure.add_scatter(
            x=observed,
            y=list(range(len(found))),
            mode="markers",
            marker={
                "symbol": "circle-open",
                "size": 13,
                "color": INK,
                "line": {"width": 2.5},
            },
            name="half of the tokens no longer settle",
            hovertemplate="half of the tokens no longer settle<extra></extra>",
        )


def _place(scales: Sequence[float], value: float | None) -> float | None:
    """Of a scale among the columns, by its logarithm."""
    if value is None:
        return None
    for place in range(len(scales) - 1):
        if scales[place] <= value <= scales[place + 1]:
            return place + math.log(value / scales[place]) / math.log(scales[place + 1] / scales[place])
    return None


def training_sections(results: Sequence[SweepResult]) -> list[Section]:
    """The ranking, and loss against recurrences as small multiples."""
    found = summaries(results)
    looped = [each for each in found if each.control is None]
    ranking = Section(
        anchor="training",
        short="Ranking",
        title="Which trained designs do best, and keep it?",
        lead="Filled marks are losses at the trained number of recurrences, open ones at the largest number; a line "
        "joins the two means. Designs are in the order of the first.",
        figures=[_ranking(found, accuracy=False), _ranking(found, accuracy=True)],
    )
    curves = Section(
        anchor="training-curves",
        short="Loss by recurrences",
        title="What do more recurrences than in training do?",
        lead="Each panel is a design, each line a seed; feed-forward controls of the first seed are dashed (as deep) "
        "and dotted (as large). The vertical line is the trained number of recurrences.",
        columns=3,
        figures=[_loss_curves(each, results, index) for index, each in enumerate(looped)],
    )
    return [ranking, curves]


def _ranking(found: Sequence[DesignSummary], *, accuracy: bool) -> Figure:
    what = "accuracy" if accuracy else "loss"
    title = "accuracy" if accuracy else "test loss (nats)"
    figure = base_figure(title, "", hovermode="closest")
    for row, each in enumerate(found):
        colour = MUTED if each.control else CATEGORIES[0]
        here = [_value(one, one.trained, accuracy=accuracy) for one in each.results]
        there = [_value(one, max(one.loss), accuracy=accuracy) for one in each.results]
        if each.control is None:
            figure.add_scatter(
                x=[sum(here) / len(here), sum(there) / len(there)], y=[row, row], mode="lines",
                line={"color": colour, "width": 1.5}, opacity=0.6, showlegend=False, hoverinfo="skip",
            )  # fmt: skip
            _marks(figure, there, row, each, colour, "-open", f"{what} at the largest number of recurrences")
        _marks(figure, here, row, each, colour, "", f"{what} at the trained number of recurrences")
    for name, symbol, colour in (
        ("looped, trained recurrences", "circle", CATEGORIES[0]),
        ("looped, largest number", "circle-open", CATEGORIES[0]),
        ("feed-forward control", "square", MUTED),
    ):
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=name, marker={"symbol": symbol, "size": 9, "color": colour}
        )
    if not accuracy:
        figure.update_xaxes(type="log")
    figure.update_xaxes(showgrid=True)
    figure.update_yaxes(
        tickvals=list(range(len(found))),
        ticktext=[plot_text(each.name, 44) for each in found],
        range=[len(found) - 0.5, -0.5],
        ticks="",
        showgrid=False,
        tickfont={"size": 11.5},
    )
    return Figure(
        anchor="training-accuracy" if accuracy else "training-ranking",
        title="How accurate?" if accuracy else "Which loss, and what becomes of it?",
        caption="A mark is a seed."
        + (" Share of tokens that are the likeliest one; earlier tokens are given." if accuracy else " Logarithmic."),
        plot=figure,
        height=150 + 24 * len(found),
    )


def _marks(
    figure: go.Figure, values: Sequence[float], row: int, design: DesignSummary, colour: str, form: str, what: str
) -> None:
    symbol = ("square" if design.control else "circle") + form
    figure.add_scatter(
        x=list(values),
        y=[row] * len(values),
        mode="markers",
        marker={"symbol": symbol, "size": 8, "color": colour},
        showlegend=False,
        text=[f"seed {one.cell.seed}" for one in design.results],
        hovertemplate=f"{plot_text(design.name)}, %{{text}}<br>{what}: %{{x:.4g}}<extra></extra>",
    )


def _value(result: SweepResult, recurrences: int, *, accuracy: bool) -> float:
    return (result.accuracy if accuracy else result.loss)[recurrences]


def _loss_curves(design: DesignSummary, results: Sequence[SweepResult], index: int) -> Figure:
    figure = base_figure("recurrences", "loss (nats)", hovermode="closest")
    first = design.results[0]
    numbers = sorted(first.loss)
    for each, colour in zip(design.results, ordered_colours(len(design.results) + 1), strict=False):
        figure.add_scatter(
            x=sorted(each.loss),
            y=[each.loss[number] for number in sorted(each.loss)],
            mode="lines+markers",
            name=f"seed {each.cell.seed}",
            line={"color": colour, "width": 2},
            marker={"size": 5},
            hovertemplate="after %{x}: %{y:.4g} nats<extra></extra>",
        )
    for control, (dash, name) in _CONTROLS.items():
        other = control_results(results, first, control)
        if other is not None:
            figure.add_scatter(
                x=[numbers[0], numbers[-1]],
                y=[other.loss_at_trained] * 2,
                mode="lines",
                name=name,
                line={"color": MUTED, "dash": dash, "width": 1.5},
                hovertemplate=f"{name}: %{{y:.4g}} nats<extra></extra>",
            )
    lines_across(figure, {"color": MUTED, "width": 1}, x=[first.trained])
    figure.update_xaxes(type="log", tickvals=numbers, ticktext=[str(number) for number in numbers])
    verdict = f"kept in {design.kept} of {len(design.results)} seeds"
    return Figure(
        anchor=f"training-curve-{index}",
        title=f"{design.name}: {verdict}",
        caption=f"{first.layout}, {first.parameters:,} parameters.",
        plot=figure,
        height=260,
    )
