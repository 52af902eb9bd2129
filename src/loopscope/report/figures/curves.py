"""Numbers before they are drawn: middles and bands over prompts, and the three ways to lay a quantity of every visit
out (method: by layer, by recurrence, by depth)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray
from jaxtyping import Float64
from numpy.typing import NDArray

from loopscope._util.wording import plural, significant
from loopscope.answers.comparison.curves import relative_depth
from loopscope.answers.quantities import StageQuantity
from loopscope.answers.readout import final_from
from loopscope.report.figures.look import CATEGORIES, MUTED, layer_colours, named_in_legend, ordered_colours
from loopscope.report.figures.plot import Axis, Band, Line, Mark, Panel, Rule, Scale, Shade
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView, median_over_prompts, powers_of_two, quantile_over, sites_of

Layout = Literal["by layer", "by recurrence", "by depth"]

BAND_LEVELS = (0.05, 0.95)
"""What lies outside a band are the outer 5 % on either side: quantiles that every study keeps."""
FEW = 8
"""Recurrences of the paper's figures through every visit; its appendix shows more."""

_MOST_PARTED = 16
"""Recurrences between which lines are drawn; more would hide the curve."""
_MOST_JOINED = 12
"""Layers of which each gets a line of its own through the visits."""
_FAR = 100.0
"""A floor that lies farther below the curves than this factor is left out: it would flatten them."""


def per_row(shown: xarray.Dataset, name: str) -> xarray.DataArray:
    """A Frobenius distance of attention maps over sqrt(T), so that prompts of different length compare."""
    return shown[name] / np.sqrt(shown["token_count"])


def stable_share(stable_from: xarray.DataArray, counts: NDArray[np.int64]) -> Float64[np.ndarray, "layer count"]:
    """Share of a layer's (head, prompt) pairs that are stable after that many recurrences, from `head_stable_from`."""
    settled = [(stable_from <= count).where(np.isfinite(stable_from), other=False) for count in counts]
    shares = [one.mean([dim for dim in one.dims if dim != "layer"]).values for one in settled]
    return np.stack(shares, axis=-1).astype(np.float64)


def final_shares(top: xarray.DataArray) -> tuple[Float64[np.ndarray, " readout"], Float64[np.ndarray, " readout"]]:
    """Of all tokens, the share whose most probable next token is the last readout's at each readout, and the share that
    keeps it from there; from `token_top1`."""
    rows = top.transpose("readout_recurrence", "prompt", "token").values
    there = rows[-1] >= 0
    place = final_from(rows)[there]
    agrees = np.array([(row == rows[-1])[there].mean() for row in rows])
    return agrees, np.array([(place <= index).mean() for index in range(len(rows))])


def drawn_recurrences(total: int, settings: ReportSettings) -> NDArray[np.int64]:
    """The recurrences to draw, counted from 1: all of them, or a selection that is denser at the start."""
    most = settings.most_recurrences
    if total <= most:
        return np.arange(1, total + 1)
    spaced = np.geomspace(1, total, most)
    return np.unique(np.concatenate([np.arange(1, most // 4), spaced.round().astype(np.int64)]))


def passes(total: int, most: int = 8) -> list[int]:
    """Recurrences from 1 that get a line each: all of a few, else powers of two and the last."""
    return list(range(1, total + 1)) if total <= most else powers_of_two(total)


def judged_at(view: StudyView) -> int:
    """The trained number of recurrences, or the last one measured where that is not known or not reached."""
    return min(view.trained or view.recurrences, view.recurrences)


def one_recurrence(view: StudyView) -> str | None:
    return None if view.recurrences > 1 else "one recurrence was measured, so there is no change"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Low edge, middle and high edge of a quantity at every visit; NaN where there is none."""

    block: Float64[np.ndarray, "3 layer recurrence"]
    prelude: Float64[np.ndarray, "3 prelude"]
    coda: Float64[np.ndarray, "3 coda"]
    band: str
    """What lies between the edges."""

    @property
    def recurrences(self) -> int:
        return int(self.block.shape[2])

    def along_depth(self, recurrences: int) -> Float64[np.ndarray, "3 visit"]:
        """Through all visits in order, up to a recurrence; the coda follows the last recurrence only."""
        loop = self.block[:, :, :recurrences].transpose(0, 2, 1).reshape(3, -1)
        last = [self.coda] if recurrences == self.recurrences else []
        return np.concatenate([self.prelude, loop, *last], axis=1)


def state_curve(view: StudyView, name: str) -> Curve:
    """A variable with dimensions (layer, recurrence, prompt): median over prompts.

    The band is the study's quantiles over tokens, medians over prompts; of a variable that has none there is no band.
    """
    middle = view.median(name)
    edges = [xarray.full_like(middle, np.nan)] * 2
    if f"{name}_quantile" in view.shown:
        quantiles = view.variable(f"{name}_quantile")
        edges = [median_over_prompts(quantiles.sel(quantile=level, drop=True)) for level in BAND_LEVELS]
    values = _stacked([edges[0], middle, edges[1]], ("layer", "recurrence"))
    return _of_block(view, values, "90 % of the tokens")


def attention_curve(view: StudyView, name: str) -> Curve:
    """A Frobenius distance of attention maps per row: mean over heads, median over prompts; the band is over heads and
    prompts."""
    view.variable(name)
    distance = per_row(view.shown, name)
    every = distance.stack(place=("head", "prompt"))
    low, high = (quantile_over(every, level, "place") for level in BAND_LEVELS)
    values = _stacked([low, median_over_prompts(distance.mean("head")), high], ("layer", "recurrence"))
    return _of_block(view, values, "90 % of the heads of all prompts")


def visit_curve(view: StudyView, quantity: StageQuantity) -> Curve:
    """A stage measure of every visit: median over prompts, the band over prompts where there are several."""
    of_prompt = quantity.of_prompt(view.shown)
    levels = [BAND_LEVELS[0], 0.5, BAND_LEVELS[1]]
    values = _stacked([median_over_prompts(of_prompt, level) for level in levels], ("depth",))
    if of_prompt.sizes["prompt"] == 1:
        values[[0, 2]] = np.nan
    sites = sites_of(view.shown)
    stages = {
        stage: values[:, [index for index, site in enumerate(sites) if site.stage == stage]]
        for stage in ("prelude", "recurrent", "coda")
    }
    loop = stages["recurrent"].reshape(3, -1, max(1, view.recurrent)).transpose(0, 2, 1)
    return Curve(
        block=loop if view.recurrent else np.empty((3, 0, 0)),
        prelude=stages["prelude"],
        coda=stages["coda"],
        band="90 % of the prompts",
    )


def _of_block(view: StudyView, values: NDArray[np.float64], band: str) -> Curve:
    """A quantity of the recurrent layers alone: gaps stand for the others, so that depth counts every layer."""
    gaps = {name: np.full((3, getattr(view, name)), np.nan) for name in ("prelude", "coda")}
    return Curve(block=values, band=band, **gaps)


def _stacked(arrays: Sequence[xarray.DataArray], dims: tuple[str, ...]) -> NDArray[np.float64]:
    return np.stack([array.transpose(*dims).values.astype(np.float64) for array in arrays])


# ---- layouts ----


def laid_out(
    view: StudyView,
    settings: ReportSettings,
    curve: Curve,
    layout: Layout,
    y_title: str,
    recurrences: Sequence[int] = (),
    *,
    scale: Scale = "auto",
    floor: bool = False,
    title: str = "",
    anchor: str = "",
    more: Sequence[Mark] = (),
    folded: bool = False,
) -> Panel:
    """A curve in one of the layouts.

    `recurrences`, counted from 1, are the lines of a drawing by recurrence; of one by depth the last is the last drawn;
    one by layer shows all. `floor` adds the noise floor, `more` other marks.
    """
    if layout == "by layer":
        x, marks = _by_layer(view, settings, curve)
    elif layout == "by recurrence":
        x, marks = _by_recurrence(view, curve, recurrences)
    else:
        x, marks = _by_depth(view, curve, max(recurrences, default=0))
    if floor and (level := noise_floor(view, curve)) is not None:
        marks.append(Rule(y=level, name="noise floor", dash="dot"))
    return Panel(
        x=x, y=Axis(title=y_title, scale=scale), marks=[*marks, *more], title=title, anchor=anchor, folded=folded
    )


def count_axis(total: int) -> Axis:
    """Recurrences from 1."""
    return Axis(title="recurrence", span=(0.5, 1.5) if total == 1 else (1, total), whole=True)


def share_axis(title: str) -> Axis:
    """From 0 to 100 %."""
    return Axis(title=title, percent=True, span=(-0.03, 1.03))


def trained_mark(view: StudyView, at: float | None = None) -> list[Mark]:
    """A dashed line at the trained number of recurrences, named above the panel; nothing where it was not reached.

    `at` is its place on an axis that is not of recurrences.
    """
    if view.trained is None or view.trained > view.recurrences:
        return []
    return [Rule(x=float(view.trained) if at is None else at, name=f"trained: {view.trained}", above=True)]


def noise_floor(view: StudyView, curve: Curve) -> float | None:
    """The estimated noise floor, median over layers and prompts, where it is near the curves."""
    floor, values = view.variable("noise_floor").values, curve.block[1]
    floor, values = floor[np.isfinite(floor) & (floor > 0)], values[values > 0]
    if not floor.size or not values.size:
        return None
    level = float(np.median(floor))
    return level if level >= values.min() / _FAR else None


def floor_words(view: StudyView, curve: Curve) -> str:
    """For a reading: where the noise floor is."""
    floor = view.variable("noise_floor").values
    floor = floor[np.isfinite(floor) & (floor > 0)]
    if noise_floor(view, curve) is not None:
        return "Dotted: the estimated noise floor, where the remaining motion is rounding."
    if not floor.size:
        return ""
    return f"The estimated noise floor, {significant(float(np.median(floor)))}, lies far below the axis."


def line_words(view: StudyView, layout: Layout, curve: Curve, recurrences: Sequence[int] = ()) -> list[str]:
    """Sentences for a reading: what lines, band and marks of a layout are; `recurrences` as in `laid_out`."""
    where = ""
    if layout == "by layer":
        sentences, where = ["One line per recurrent layer."], " belongs to the last layer and"
    elif layout == "by recurrence":
        which = ", ".join(map(str, recurrences))
        lines = f"One line per recurrence ({which}) along the depth of one pass, later ones lighter"
        outside = view.prelude + view.coda
        sentences = [f"{lines}; prelude and coda, which run once, are shaded." if outside else f"{lines}."]
        where = " belongs to the last of them and"
    else:
        joined = view.looped and view.recurrent <= _MOST_JOINED
        cut = view.looped and recurrences[-1] < view.recurrences
        upto = f" of the first {plural(recurrences[-1], 'recurrence')}" if cut else ""
        sentences = [
            f"All layer applications{upto} in order" + ("; coloured lines join those of a layer." if joined else ".")
        ]
    if np.isfinite(np.concatenate([each[0].ravel() for each in (curve.block, curve.prelude, curve.coda)])).any():
        sentences.append(f"The grey band{where} holds {curve.band}.")
    reached = view.recurrences if layout == "by layer" else max(recurrences, default=0) - 1
    if layout != "by recurrence" and view.looped and view.trained is not None and view.trained <= reached:
        sentences.append("Dashed: the trained number of recurrences.")
    return sentences


def layer_lines(rows: NDArray[np.floating], x: NDArray[np.int64], *, steps: bool = False) -> list[Mark]:
    """A line per layer, named by its number; of many the first, the middle and the last are named."""
    colours = layer_colours(len(rows))
    return [
        Line(x=x, y=row, name=str(layer), colour=colour, steps=steps, listed=named_in_legend(layer, len(rows)))
        for layer, (row, colour) in enumerate(zip(rows, colours, strict=True))
    ]


def _band(curve: Curve, x: NDArray[np.floating] | NDArray[np.int64], values: NDArray[np.float64]) -> list[Mark]:
    """Where both edges are there."""
    if not (np.isfinite(values[0]) & np.isfinite(values[2])).any():
        return []
    return [Band(x=x, low=values[0], high=values[2], name=curve.band.replace(" of the", " of"), explained=True)]


def _by_layer(view: StudyView, settings: ReportSettings, curve: Curve) -> tuple[Axis, list[Mark]]:
    counts = drawn_recurrences(curve.recurrences, settings)
    shown = curve.block[:, :, counts - 1]
    band = _band(curve, counts, shown[:, -1]) if shown.shape[1] else []
    return count_axis(curve.recurrences), [*band, *layer_lines(shown[1], counts), *trained_mark(view)]


def _by_recurrence(view: StudyView, curve: Curve, recurrences: Sequence[int]) -> tuple[Axis, list[Mark]]:
    where = relative_depth(view.prelude + view.recurrent + view.coda)
    before, block, after = np.split(where, [view.prelude, view.prelude + view.recurrent])
    marks: list[Mark] = []
    if view.prelude:
        marks.append(Shade(start=0.0, end=float(before[-1] + block[0]) / 2, name="prelude"))
    if view.coda:
        marks.append(Shade(start=float(block[-1] + after[0]) / 2, end=100.0, name="coda"))
    if recurrences:
        marks += _band(curve, block, curve.block[:, :, recurrences[-1] - 1])
    labels = [f"layer {layer}" for layer in range(view.recurrent)]
    for count, colour in zip(recurrences, ordered_colours(len(recurrences)), strict=True):
        values = curve.block[1, :, count - 1]
        if np.isfinite(values).any():  # a first step there is none, and a last one may be nothing at all
            marks.append(Line(x=block, y=values, name=str(count), colour=colour, points=True, labels=labels))
    for stage, outer, x in (("prelude", curve.prelude[1], before), ("coda", curve.coda[1], after)):
        if np.isfinite(outer).any():
            marks.append(
                Line(
                    x=x, y=outer, name="prelude, coda", colour=MUTED,
                    points=True, explained=True, labels=[f"{stage} {n}" for n in range(len(outer))],
                    tip="{label}: {y:.3g}",
                )
            )  # fmt: skip
    return Axis(title="relative depth (%)", span=(-2, 102)), marks


def _by_depth(view: StudyView, curve: Curve, recurrences: int) -> tuple[Axis, list[Mark]]:
    values = curve.along_depth(recurrences)
    layers, looped = curve.block.shape[1], view.looped
    # Visits are counted from 1, as recurrences are; layers, as everywhere, from 0.
    visits = np.arange(values.shape[1]) + (1 if looped else 0)
    labels = [
        *(f"prelude {layer}" for layer in range(view.prelude)),
        *(f"layer {layer}, recurrence {at}" for at in range(1, recurrences + 1) for layer in range(layers)),
        *(f"coda {layer}" for layer in range(view.coda)),
    ][: len(visits)]
    if not looped:
        labels = [f"layer {layer}" for layer in range(len(visits))]
    marks = _band(curve, visits, values)
    marks.append(
        Line(
            x=visits, y=values[1], name="every visit" if looped else "", colour=MUTED if looped else CATEGORIES[0],
            width=1.3 if looped else 2, points=len(visits) <= 24, explained=True, labels=labels, tip="{label}: {y:.3g}",
        )
    )  # fmt: skip
    if layers <= _MOST_JOINED:
        for layer, colour in enumerate(layer_colours(layers)):
            at = view.prelude + layer + 1 + layers * np.arange(recurrences)
            marks.append(
                Line(
                    x=at, y=curve.block[1, layer, :recurrences], name=str(layer), colour=colour,
                    labels=[f"recurrence {count + 1}" for count in range(recurrences)],
                )
            )  # fmt: skip
    if recurrences and recurrences <= _MOST_PARTED:
        marks += [Rule(x=view.prelude + layers * count + 0.5, dash="dot") for count in range(recurrences + 1)]
    if looped and view.trained is not None and view.trained < recurrences:
        marks += trained_mark(view, view.prelude + layers * view.trained + 0.5)
    title = "layer application, in order" if looped else "layer"
    return Axis(title=title, span=(float(visits[0]) - 0.5, float(visits[-1]) + 0.5), whole=True), marks
