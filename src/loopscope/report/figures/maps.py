"""Single attention maps: those of one head side by side, and all maps of one prompt (the looped floorplan).

The bytes of the maps stand in the page once, compressed; `templates/maps.js` draws both figures from them. For papers
the floorplan is a figure like others.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from loopscope._util.map_codes import HIGHEST, UNKNOWN
from loopscope._util.wording import listed, visible
from loopscope.report.figures.map_data import (
    layer_name,
    map_data,
    mapped_prompts,
    mapped_sites,
    palette,
    pass_name,
    shown_codes,
)
from loopscope.report.figures.plot import Axis, FigureType, HeatMap, Panel, Plot, Section, script_json
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
"""Named on the colour bar, which is even in the square root of attention."""
_TICKS_APART = (0, 0.1, 0.5, 1)
"""On the short one of a paper."""
_STOPS = 17
"""Colours from which the browser makes the colour bar."""
_PLAN = (1240, 480)
"""CSS pixels, width and height, that a floorplan may take of a wide window, so that all of it is seen at a glance."""
_AROUND = (42, 60)
"""What the names around one block of it take."""
_MOST_BESIDE = 12
"""Heads of a block beside which there is room for another on a page of a paper."""
_SMALLEST, _LARGEST = 16, 96
"""CSS pixels of a map in a floorplan: with fewer no pattern is seen, with more it is no overview."""


@dataclass(frozen=True, kw_only=True)
class ColourScale:
    """What the colours of all maps mean."""

    gradient: str
    """From 0 to 1, as the style wants it."""
    ticks: list[tuple[float, str]]
    """(percent of the length, name)."""


@dataclass(frozen=True, kw_only=True)
class HeadMaps:
    """The maps of one head on one prompt, beside each other; the reader chooses which."""

    template: ClassVar[str] = "head_maps.html"
    folded: ClassVar[bool] = False
    anchor: ClassVar[str] = "head-maps"

    title: str
    caption: str
    layers: list[tuple[str, str]]
    """Of which a map can be seen: (key, name)."""
    heads: int
    prompts: list[str]
    scale: ColourScale
    data: Markup
    """JSON for maps.js."""

    @property
    def has_data(self) -> bool:
        return bool(self.layers)


@dataclass(frozen=True, kw_only=True)
class Floorplan:
    """Every map that the study holds of one prompt."""

    template: ClassVar[str] = "floorplan.html"
    folded: ClassVar[bool] = False
    anchor: ClassVar[str] = "floorplan"

    title: str
    caption: str
    prompts: list[str]
    scale: ColourScale
    heads: int
    pixels: int
    """Of a map, at most."""
    has_data: bool


def head_maps(view: StudyView) -> HeadMaps | None:
    """None for a study without attention maps."""
    if "attention_map" not in view.dataset:
        return None
    data = view.dataset
    seen = (data["attention_map"] != UNKNOWN).any(("mapped", "head", "query", "key")).values
    looped = view.looped
    layers = {
        f"{site.stage}.{site.layer}": layer_name(site, looped)
        for site, some in zip(mapped_sites(view), seen, strict=True)
        if some
    }
    return HeadMaps(
        title="What does one head look at?",
        caption=(
            "A row shows what one token looks at. Colours follow the square root of attention, so that little "
            "attention still differs from none. All maps share one scale, unless you choose a scale for each map."
            + _on_numbers(view)
        ),
        layers=list(layers.items()),
        heads=data.sizes["head"],
        prompts=_prompt_names(view),
        scale=_scale(),
        data=script_json(map_data(view)),
    )


def _on_numbers(view: StudyView) -> str:
    """What the numbers below the maps are, where there are some."""
    said = []
    if "sink_score" in view.dataset:
        said += ["the sink score of the first token", "that of the strongest sink if it is another", "the mixing score"]
    if "attention_change" in view.dataset:
        said.append("the change per row since the recurrence before")
    return f" Below, over the whole prompt: {listed(said)}." if said else ""


def floorplan_section(view: StudyView) -> Section:
    """All maps of a prompt; a section without figures for a study that has none."""
    data = view.dataset
    figures = []
    if "attention_map" in data:
        codes = data["attention_map"]
        passes = Counter(pass_name(site, view.looped) for site in mapped_sites(view))
        figures.append(
            Floorplan(
                title="All heads on one prompt",
                caption=(
                    "Rows are layers, columns heads; in each map a row shows what one token looks at. A bright column "
                    "is a sink, a bright diagonal a head that looks at its own token. All maps share one scale, unless "
                    "you choose a scale for each map. Click on a map to enlarge it."
                ),
                prompts=_prompt_names(view),
                heads=codes.sizes["head"],
                scale=_scale(),
                pixels=_pixels(list(passes.values()), codes.sizes["head"]),
                has_data=bool((codes != UNKNOWN).any()),
            )
        )
    looped = view.looped
    return Section(
        anchor="maps",
        short="Floorplan",
        title="The looped floorplan" if looped else "The floorplan",
        lead=(
            "A small attention map for every head of every layer, in the order in which the model applies them: "
            "prelude, one block per recurrence, coda. Heads that settle look the same from block to block."
            if looped
            else "A small attention map for every head of every layer, in the order in which the model applies them."
        ),
        figures=figures,
    )


def _all_maps(view: StudyView, settings: ReportSettings) -> Plot:
    """The floorplan of one prompt: the first that the settings name and the study has maps of, or the first of all."""
    prompts, sites = mapped_prompts(view), mapped_sites(view)
    prompt = next((prompt for prompt in settings.prompts if prompt in prompts), prompts[0])
    codes = shown_codes(view)[prompts.index(prompt)]
    total, heads = len(view.strings(prompt)), codes.shape[1]
    count = min(total, codes.shape[-1])
    blocks: dict[str, list[int]] = {}
    for place, site in enumerate(sites):
        blocks.setdefault(pass_name(site, view.looped), []).append(place)
    upto = f"the first {count} of the {total} tokens" if count < total else f"the {total} tokens"
    return Plot(
        question="What does every head look at?",
        reading=f"Attention maps of prompt {prompt}, of {upto}, in the order in which the model applies its layers. "
        "Rows are layers, columns heads; in each map a row shows what one token looks at. A bright column is a sink, a "
        "bright diagonal a head that looks at its own token. Colours follow the square root of attention.",
        panels=[
            _block(name, codes[places, :, :count, :count], [sites[place].layer for place in places])
            for name, places in blocks.items()
        ],
        columns=1 if heads > _MOST_BESIDE else 0,
    )


def _block(name: str, codes: NDArray[np.uint8], layers: list[int]) -> Panel:
    """Maps side by side, `codes` of (layer, head, query, key), with a gap between each two."""
    rows, columns, side, _ = codes.shape
    step = side + max(1, side // 12)
    joined = np.full((rows * step, columns * step), np.nan)
    for row, column in np.ndindex(rows, columns):
        one = codes[row, column]
        corner = np.ix_(range(row * step, row * step + side), range(column * step, column * step + side))
        joined[corner] = np.where(one == UNKNOWN, np.nan, one / HIGHEST)
    joined = joined[: side - step, : side - step]
    return Panel(
        x=Axis(title="head", ticks={column * step + side / 2: str(column) for column in range(columns)}),
        y=Axis(title="layer", ticks={row * step + side / 2: str(layer) for row, layer in enumerate(layers)}),
        marks=[
            HeatMap(
                z=joined, x=range(joined.shape[1]), bar="attention", low=0, high=1,
                bar_ticks={math.sqrt(value): f"{100 * value:g} %" for value in _TICKS_APART},
            )
        ],
        title=name,
        equal=True,
    )  # fmt: skip


MAPS = (
    FigureType("attention-maps", _all_maps, ("attention_map",), for_paper=True, loops=False, paper=(63,)),
)  # fmt: skip


def _pixels(layers: list[int], heads: int) -> int:
    """Of a map: the most with which blocks of these layers, as many side by side as fit, are no higher than they may
    be."""
    (width, height), (beside, above) = _PLAN, _AROUND
    for pixels in range(_LARGEST, _SMALLEST, -1):
        columns = max(1, width // (heads * pixels + beside))
        if sum(max(layers[at : at + columns]) * pixels + above for at in range(0, len(layers), columns)) <= height:
            return pixels
    return _SMALLEST


def _prompt_names(view: StudyView) -> list[str]:
    """As in `Prompt 3: Ann has ...`."""
    names = []
    for prompt in mapped_prompts(view):
        entry = view.study.tokens[prompt]
        text = entry["text"] or "".join(map(str, entry["token_strings"]))
        names.append(f"Prompt {prompt}: {visible(str(text), 70)}")
    return names


def _scale() -> ColourScale:
    colours = [palette()[round(place)] for place in np.linspace(0, HIGHEST, _STOPS)]
    return ColourScale(
        gradient=", ".join(f"rgb({red}, {green}, {blue})" for red, green, blue in colours),
        ticks=[(100 * math.sqrt(value), f"{100 * value:g} %" if value else "0") for value in _TICKS],
    )
