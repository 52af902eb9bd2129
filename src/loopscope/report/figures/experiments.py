"""Figures of experiments: small multiples of a grid, the phase diagram, the ranking of designs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from loopscope._util.wording import plural, significant, visible
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.experiments.cells import CellOutcome, CellResult, by_design
from loopscope.experiments.load import Experiment
from loopscope.experiments.random_findings import Boundary, boundaries
from loopscope.experiments.sweep_cells import ControlName as Control
from loopscope.experiments.sweep_cells import SweepResult
from loopscope.experiments.sweep_findings import DesignSummary, bigram_lines, control_results, summaries
from loopscope.report.figures.look import CATEGORIES, INK, KIND_LOOKS, MUTED, kind_label, ordered_colours
from loopscope.report.figures.plot import Axis, Dash, Dots, HeatMap, Line, Mark, Panel, Plot, Rule, Section
from loopscope.study import powers_of_two

_OUTCOMES: dict[CellOutcome, tuple[str, Dash]] = {
    CellOutcome.FIXED_POINT: (CATEGORIES[0], "solid"),
    CellOutcome.DEGENERATE: (CATEGORIES[1], "dash"),
    CellOutcome.DIRECTION: (CATEGORIES[4], "dashdot"),
    CellOutcome.NONE: (CATEGORIES[3], "dot"),
    CellOutcome.NOT_YET: (CATEGORIES[2], "longdash"),
    CellOutcome.CANNOT_TELL: (KIND_LOOKS[Kind.UNKNOWN].colour, "longdash"),
}
_DASHES: tuple[Dash, ...] = ("solid", "dash", "dot", "dashdot", "longdash")
"""Of the ways in which the prompt is injected."""
_OF_FIGURE_6 = 12
"""Layers of the models in the paper's Figure 6; those in its appendix have others."""
_FLOOR = 1e-8
"""Distances below are drawn there: float32 knows no smaller one."""
_ROW = 34
"""CSS pixels of a design in a ranking or a phase diagram."""
_CONTROLS: dict[Control, tuple[Dash, str]] = {
    "equal-depth": ("dash", "feed-forward, as deep"),
    "equal-parameters": ("dot", "feed-forward, as large"),
}


def experiment_sections(experiment: Experiment) -> list[Section]:
    """All figures of an experiment; names of files are their anchors."""
    if experiment.kind == "training":
        return training_sections(experiment.trained)
    section = architecture_section if experiment.kind == "architectures" else phase_section
    return [section(experiment.cells)]


# ---- random models ----


def architecture_section(cells: Sequence[CellResult]) -> Section:
    """The grid as small multiples: one per norm and injection, a curve a model."""
    plot = Plot(
        question="How far are the states from those at the horizon?",
        reading="Each panel is a design, each curve a randomly initialised model: the distance of its states to those "
        "at the horizon, over the norm there, of the layer that is farthest. A curve that falls straight to the floor "
        "settles at a constant rate.",
        panels=[
            _distances(norm, injection, group)
            for (norm, injection), group in by_design(cells, lambda cell: (cell.norm, cell.injection))
        ],
        anchor="architectures-distances",
    )
    return Section(
        anchor="architectures",
        short="Random models",
        title="Which norms and injections make fixed points?",
        lead="Randomly initialised models of every design, and where their states go.",
        figures=[*(_designs(depth, group) for depth, group in by_design(cells, lambda cell: cell.depth)), plot],
    )


def _designs(depth: int, cells: Sequence[CellResult]) -> Plot:
    """All designs of one depth: means over seeds, as the paper draws them."""
    groups = list(by_design(cells, lambda cell: (cell.norm, cell.injection)))
    norms, injections = (list(dict.fromkeys(design[place] for design, _ in groups)) for place in (0, 1))
    colours = dict(zip(norms, CATEGORIES, strict=False))
    dashes = dict(zip(injections, _DASHES, strict=False))
    nowhere = [math.nan] * 2
    named: list[Mark] = [
        *(Line(x=nowhere, y=nowhere, name=norm, colour=colour) for norm, colour in colours.items()),
        *(
            Line(x=nowhere, y=nowhere, name=f"injection {injection}", colour=MUTED, dash=dash)
            for injection, dash in dashes.items()
        ),
    ]
    horizon = max(each.counts[-1] for each in cells)
    seeds = sorted({len(group) for _, group in groups})
    models = plural(seeds[0], "randomly initialised model") if len(seeds) == 1 else "Randomly initialised models"
    return Plot(
        question=f"{plural(depth, 'layer')}: which designs settle, and does each layer have a point of its own?",
        reading=f"{models} of each design. (a) Distance of the states to those after {plural(horizon, 'recurrence')}, "
        "over the norm there, of the layer that is farthest; the mean over models, which ends where one of them "
        "overflows. (b) The least cosine between the "
        "first layer's last state and another's: mean, and whiskers to the least and the largest; near 1, all "
        "layers share one direction.",
        panels=[
            Panel(
                x=Axis(title="recurrences", scale="log", ticks=powers_of_two(horizon)),
                y=Axis(title="relative distance", scale="log", span=(_FLOOR / 1.6, 5.0)),
                marks=[
                    *(
                        _mean_distance(f"{norm}, injection {injection}", group, colours[norm], dashes[injection])
                        for (norm, injection), group in groups
                    ),
                    *named,
                ],
            ),
            Panel(
                x=Axis(title="least cosine between layers", grid=True),
                y=Axis(
                    title="",
                    ticks={row: f"{norm}, {injection}" for row, ((norm, injection), _) in enumerate(groups)},
                    span=(len(groups) - 0.5, -0.5),
                    grid=False,
                ),
                marks=[_least_cosine(row, group, colours[design[0]]) for row, (design, group) in enumerate(groups)],
            ),
        ],
        anchor=f"architectures-{depth}-layers",
        paper=(6,) if depth == _OF_FIGURE_6 else (29, 30, 31),
    )


def _mean_distance(name: str, group: Sequence[CellResult], colour: str, dash: Dash) -> Line:
    """Where all have a number; the last count is the horizon itself, whose distance is zero."""
    at = [dict(zip(each.counts[:-1], each.distance[:-1], strict=True)) for each in group]
    rows = {count: [value for each in at if (value := each.get(count)) is not None] for count in at[0]}
    means = {count: max(float(np.mean(row)), _FLOOR) for count, row in rows.items() if len(row) == len(at)}
    return Line(
        x=list(means), y=list(means.values()), colour=colour, dash=dash, width=1.6,
        tip=f"{name}\nafter {{x}}: {{y:.2g}}",
    )  # fmt: skip


def _least_cosine(row: int, group: Sequence[CellResult], colour: str) -> Dots:
    known = [each.degeneracy for each in group if each.degeneracy is not None] or [math.nan]
    return Dots(
        x=[float(np.mean(known))], y=[row], left=[min(known)], right=[max(known)], colour=colour, size=8,
        tip=f"{group[0].cell.norm}, {group[0].cell.injection}: {{x:.3f}}",
    )  # fmt: skip


def _distances(norm: str, injection: str, group: Sequence[CellResult]) -> Panel:
    marks: list[Mark] = []
    named: set[CellOutcome] = set()
    for each in group:
        colour, dash = _OUTCOMES[each.outcome]
        # The last one is the horizon itself, whose distance is zero.
        points = [
            (count, max(value, _FLOOR))
            for count, value in zip(each.counts[:-1], each.distance[:-1], strict=True)
            if value is not None
        ]
        marks.append(
            Line(
                x=[count for count, _ in points],
                y=[value for _, value in points],
                name=str(each.outcome),
                listed=each.outcome not in named,
                colour=colour,
                dash=dash,
                width=1.6,
                tip=f"{each.cell.depth} layers, seed {each.cell.seed}\nafter {{x}}: {{y:.2g}}",
            )
        )
        named.add(each.outcome)
    outcomes = [str(each.outcome) for each in group]
    found = ", ".join(f"{outcomes.count(name)} {name}" for name in dict.fromkeys(outcomes))
    return Panel(
        x=Axis(title="recurrences", scale="log", ticks=powers_of_two(max(each.counts[-1] for each in group))),
        y=Axis(title="relative distance", scale="log", span=(_FLOOR / 1.6, 5.0)),
        marks=marks,
        title=f"{norm}, injection {injection}: {found}",
        anchor=f"architectures-{norm}-{injection}",
        height=270,
    )


def phase_section(cells: Sequence[CellResult]) -> Section:
    """What tokens tend to over the scale of the weights, and where eigenvalues put the loss of stability."""
    found = boundaries(cells)
    plots = [_phase_map(found), *(_two_scales(group) for group in _by_injection_scale(found))]
    return Section(
        anchor="phase",
        short="Phase diagram",
        title="Up to which scale of the weights does a design settle?",
        lead="Tiles show what most tokens do in the long run. The black line is where the largest predicted rate "
        "crosses 1: to its left the fixed point attracts, by the eigenvalues.",
        figures=[plot for plot in plots if plot.has_data],
    )


def _by_injection_scale(found: Sequence[Boundary]) -> list[list[Boundary]]:
    """Designs that were run at several scales of the injection."""
    groups: dict[tuple[str, str], list[Boundary]] = {}
    for each in found:
        groups.setdefault((each.norm, each.injection), []).append(each)
    return [sorted(group, key=lambda each: each.injection_scale) for group in groups.values() if len(group) > 1]


def _phase_map(found: Sequence[Boundary]) -> Plot:
    rows = [
        f"{each.norm}, {each.injection}" + (f" × {each.injection_scale:g}" if each.injection_scale != 1 else "")
        for each in found
    ]
    return Plot(
        question="What do the tokens do, design by design?",
        reading="Numbers are the largest predicted rate of the tokens whose fixed point is known; no number: none is. "
        "Black lines: where that rate crosses 1, between two scales by their logarithm. Rings: where half of the "
        "tokens no longer settle.",
        panels=[_tiles(found, rows, "", joined=False)],
        anchor="phase-map",
    )


def _two_scales(group: Sequence[Boundary]) -> Plot:
    norm, injection = group[0].norm, group[0].injection
    return Plot(
        question=f"{norm}, injection {injection}: weights against injection",
        reading="The black curve joins the scales at which the largest predicted rate crosses 1; rings are where half "
        "of the tokens no longer settle.",
        panels=[_tiles(group, [f"{each.injection_scale:g}" for each in group], "factor on the injection", joined=True)],
        anchor=f"phase-{norm}-{injection}",
    )


def _tiles(found: Sequence[Boundary], rows: Sequence[str], y_title: str, *, joined: bool) -> Panel:
    """A tile for each row and scale, coloured by the commonest kind, with its letter and the predicted rate."""
    scales = found[0].scales
    tiles = HeatMap(
        z=np.array([[KINDS.index(Kind(tends)) for tends in each.tends] for each in found]),
        x=range(len(scales)),
        bar="",
        palette=[KIND_LOOKS[kind].colour for kind in KINDS],
        gaps=True,
        texts=[
            [
                KIND_LOOKS[Kind(tends)].letter + ("" if radius is None else f" {radius:.2f}")
                for tends, radius in zip(each.tends, each.radius, strict=True)
            ]
            for each in found
        ],
        labels=[
            [
                f"{name}, std {scale:g}\n{tends}; {100 * settled:.0f} % of tokens settle\npredicted rate "
                + ("unknown" if radius is None else significant(radius, 3))
                for scale, tends, settled, radius in zip(
                    each.scales, each.tends, each.settles, each.radius, strict=True
                )
            ]
            for name, each in zip(rows, found, strict=True)
        ],
        tip="{label}",
    )
    kinds = dict.fromkeys(Kind(tends) for each in found for tends in each.tends)
    return Panel(
        x=Axis(
            title="standard deviation of the weights",
            ticks={place: f"{scale:g}" for place, scale in enumerate(scales)},
            span=(-0.5, len(scales) - 0.5),
        ),
        y=Axis(title=y_title, ticks=dict(enumerate(rows)), span=(len(rows) - 0.5, -0.5)),
        marks=[
            tiles,
            *(
                Dots(x=[np.nan], y=[np.nan], name=kind_label(kind), colour=KIND_LOOKS[kind].colour, symbol="square")
                for kind in kinds
            ),
            *_crossings(found, joined=joined),
        ],
        height=(190 if joined else 150) + len(found) * _ROW,
    )


def _crossings(found: Sequence[Boundary], *, joined: bool) -> list[Mark]:
    """Where predicted rates cross 1, as a line, and where tokens stop settling, as rings."""
    marks: list[Mark] = []
    rows = np.arange(len(found), dtype=np.float64)
    places = np.array([_place(each.scales, each.predicted) for each in found])
    if np.isfinite(places).any():
        # Unless they are joined, a line of its own through each row.
        x = places if joined else np.stack([places, places, np.full_like(places, np.nan)], axis=1).ravel()
        y = rows if joined else np.stack([rows - 0.5, rows + 0.5, rows], axis=1).ravel()
        name = "predicted rate crosses 1"
        marks.append(Line(x=x, y=y, name=name, colour=INK, width=3.5, points=joined, tip=name))
    observed = np.array([_place(each.scales, each.observed) for each in found])
    if np.isfinite(observed).any():
        name = "half of the tokens no longer settle"
        marks.append(Dots(x=observed, y=rows, name=name, colour=INK, hollow=True, size=13, tip=name))
    return marks


def _place(scales: Sequence[float], value: float | None) -> float:
    """Of a scale among the columns, by its logarithm; NaN where it is not known."""
    for place in range(len(scales) - 1 if value is not None else 0):
        assert value is not None
        if scales[place] <= value <= scales[place + 1]:
            return place + math.log(value / scales[place]) / math.log(scales[place + 1] / scales[place])
    return math.nan


# ---- trained models ----


def training_sections(results: Sequence[SweepResult]) -> list[Section]:
    """The ranking, and loss against recurrences as small multiples."""
    found = summaries(results)
    looped = [each for each in found if each.control is None]
    ranking = Plot(
        question="How do the designs rank by loss and accuracy?",
        reading="(a) Test loss, (b) accuracy: share of tokens that the model finds most "
        "probable, given the earlier ones. Each mark is a seed: filled at the trained number of recurrences, open at "
        "the largest number; a line joins the two means. The dashed line is the loss of a bigram table fitted to the "
        "test text itself: a design to its right may have learnt no more than pairs of tokens.",
        panels=[_ranking(found, accuracy=False), _ranking(found, accuracy=True)],
        anchor="training-ranking",
    )
    curves = Plot(
        question="What is the loss after each number of recurrences?",
        reading="Each panel is a design, each line a seed; feed-forward controls of the first seed are dashed (as "
        "deep) and dotted (as large). The vertical line is the trained number of recurrences, the horizontal one the "
        "loss of a bigram table fitted to the test text. Kept: whether the loss at the largest number is about that "
        "at the trained one, by the interval over seeds, and in how many seeds.",
        panels=[_loss_curves(each, results, index) for index, each in enumerate(looped)],
        anchor="training-losses",
    )
    return [
        Section(
            anchor="training",
            short="Ranking",
            title="Which trained designs do best, and keep their loss?",
            lead="Designs in the order of their loss at the trained number of recurrences.",
            figures=[ranking],
        ),
        Section(
            anchor="training-curves",
            short="Loss by recurrences",
            title="What happens beyond the trained recurrences?",
            lead="Test loss of every trained design, at fewer and at more recurrences than it was trained with.",
            figures=[curves] if curves.has_data else [],
        ),
    ]


def _ranking(found: Sequence[DesignSummary], *, accuracy: bool) -> Panel:
    what = "accuracy" if accuracy else "loss"
    marks: list[Mark] = []
    for row, each in enumerate(found):
        colour = MUTED if each.control else CATEGORIES[0]
        here = [_value(one, one.trained, accuracy=accuracy) for one in each.results]
        there = [_value(one, max(one.loss), accuracy=accuracy) for one in each.results]
        if each.control is None:
            means = [float(np.mean(here)), float(np.mean(there))]
            names = [visible(each.name, 60)] * 2
            marks.append(Line(x=means, y=[row, row], colour=colour, width=1, labels=names, tip="{label}"))
            marks.append(_seeds(there, row, each, colour, f"{what} at the largest number of recurrences", hollow=True))
        marks.append(_seeds(here, row, each, colour, f"{what} at the trained number of recurrences"))
    nowhere = [math.nan]
    marks += [
        Dots(x=nowhere, y=nowhere, name="looped, trained recurrences", colour=CATEGORIES[0]),
        Dots(x=nowhere, y=nowhere, name="looped, largest number", colour=CATEGORIES[0], hollow=True),
        Dots(x=nowhere, y=nowhere, name="feed-forward control", colour=MUTED, symbol="square"),
    ]
    if not accuracy:
        marks += [
            Rule(x=value, name=name) for name, value in _bigram_rules([one for each in found for one in each.results])
        ]
    return Panel(
        x=Axis(title="accuracy", grid=True) if accuracy else Axis(title="test loss (nats)", scale="auto", grid=True),
        y=Axis(
            title="",
            ticks={row: visible(each.name, 44) for row, each in enumerate(found)},
            span=(len(found) - 0.5, -0.5),
            grid=False,
        ),
        marks=marks,
        anchor="training-accuracy" if accuracy else "",
        height=150 + 24 * len(found),
    )


def _bigram_rules(results: Sequence[SweepResult]) -> list[tuple[str, float]]:
    """Lines that a logarithmic axis can have."""
    return [(name, value) for name, value in bigram_lines(results).items() if value > 0]


def _seeds(
    values: Sequence[float], row: int, design: DesignSummary, colour: str, what: str, *, hollow: bool = False
) -> Dots:
    return Dots(
        x=values,
        y=[row] * len(values),
        colour=colour,
        symbol="square" if design.control else "circle",
        hollow=hollow,
        size=8,
        labels=[f"{visible(design.name, 60)}, seed {one.cell.seed}" for one in design.results],
        tip=f"{{label}}\n{what}: {{x:.4g}}",
    )


def _value(result: SweepResult, recurrences: int, *, accuracy: bool) -> float:
    return (result.accuracy if accuracy else result.loss)[recurrences]


def _loss_curves(design: DesignSummary, results: Sequence[SweepResult], index: int) -> Panel:
    first = design.results[0]
    numbers = sorted(first.loss)
    marks: list[Mark] = []
    for each, colour in zip(design.results, ordered_colours(len(design.results) + 1), strict=False):
        counts = sorted(each.loss)
        marks.append(
            Line(
                x=counts, y=[each.loss[number] for number in counts], name=f"seed {each.cell.seed}", colour=colour,
                points=True, tip="after {x}: {y:.4g} nats",
            )
        )  # fmt: skip
    for control, (dash, name) in _CONTROLS.items():
        other = control_results(results, first, control)
        if other is not None:
            marks.append(
                Line(
                    x=[numbers[0], numbers[-1]], y=[other.loss_at_trained] * 2, name=name, colour=MUTED, dash=dash,
                    width=1.5, tip=f"{name}: {{y:.4g}} nats",
                )
            )  # fmt: skip
    return Panel(
        x=Axis(title="recurrences", scale="log", ticks=numbers),
        y=Axis(title="loss (nats)"),
        marks=[
            *marks,
            Rule(x=float(first.trained), dash="solid"),
            *(Rule(y=value, name=name, dash="dashdot") for name, value in _bigram_rules([first])),
        ],
        title=f"{visible(design.name, 60)}: kept? {design.kept_text}",
        anchor=f"training-curve-{index}",
        height=280,
    )
