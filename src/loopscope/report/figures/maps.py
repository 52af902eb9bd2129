"""Single attention maps: those of one head side by side, and all maps of one prompt (the looped floorplan).

The bytes of the maps stand in the page once, compressed; `templates/maps.js` draws both figures from them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from markupsafe import Markup

from loopscope._util.map_codes import HIGHEST, UNKNOWN
from loopscope._util.wording import listed, visible
from loopscope.report.figures.map_data import layer_name, map_data, mapped_prompts, mapped_sites, palette, pass_name
from loopscope.report.figures.plot import Section, script_json
from loopscope.study import StudyView

_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
"""Named on the colour bar, which is even in the square root of attention."""
_STOPS = 17
"""Colours from which the browser makes the colour bar."""
_PLAN = (1240, 1000)
"""CSS pixels, width and height, that a floorplan may take of a wide window, so that all of it is seen at a glance."""
_AROUND = (50, 60)
"""What the names around one block of it take."""
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
            "A row shows what one token looks at. All maps share one scale of colours, even in the square root of "
            "attention, so that little differs visibly from nothing." + _on_numbers(view)
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
                    "is a sink, a bright diagonal a head that looks at its own token. Click on a map to see it large."
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
            "prelude, one block per recurrence, coda. Heads that settle look alike from block to block."
            if looped
            else "A small attention map for every head of every layer, in the order in which the model applies them."
        ),
        figures=figures,
    )


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
