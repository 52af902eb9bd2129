"""Single attention maps: those of one head side by side, and all maps of one prompt (the looped floorplan).

The bytes of the maps stand in the page once, compressed; `templates/maps.js` draws both figures from them.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.colors import sample_colorscale, unlabel_rgb

from loopscope.answers.limits import sinks_by_chance
from loopscope.map_codes import HIGHEST, UNKNOWN
from loopscope.report.depth import Site, sites_of
from loopscope.report.figure import Section, script_json, visible_text
from loopscope.report.material import Material
from loopscope.report.style import SEQUENTIAL

__all__ = ["Floorplan", "HeadMaps", "floorplan_section", "head_maps"]

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
_NUMBERS = ("sink_score", "strongest_sink", "strongest_sink_position", "mixing_score")


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


def head_maps(material: Material) -> HeadMaps | None:
    """None for a study without attention maps."""
    if "attention_map" not in material.view.dataset:
        return None
    data = material.view.dataset
    seen = (data["attention_map"] != UNKNOWN).any(("mapped", "head", "query", "key")).values
    layers = dict.fromkeys(
        f"{site.stage}.{site.layer}" for site, some in zip(_sites(material), seen, strict=True) if some
    )
    looped = material.view.looped
    return HeadMaps(
        title="What does one head look at?",
        caption=(
            "A row shows what one token looks at. All maps share one scale of colours, even in the square root of "
            "attention, so that little differs visibly from nothing." + _on_numbers(material)
        ),
        layers=[(key, _layer_name(key, looped)) for key in layers],
        heads=data.sizes["head"],
        prompts=_prompt_names(material),
        scale=_scale(),
        data=script_json(_data(material)),
    )


def _on_numbers(material: Material) -> str:
    """What the numbers below the maps are, where there are some."""
    said = []
    if "sink_score" in material.view.dataset:
        said.append("how much of the attention the first token receives, and the token that receives most; mixing")
    if "attention_change" in material.view.dataset:
        said.append("the change per row since the recurrence before")
    return f" Below, over the whole prompt: {'; '.join(said)}." if said else ""


def floorplan_section(material: Material) -> Section:
    """All maps of a prompt; a section without figures for a study that has none."""
    data = material.view.dataset
    figures = []
    if "attention_map" in data:
        codes = data["attention_map"]
        passes = Counter(_pass_name(site, material.view.looped) for site in _sites(material))
        figures.append(
            Floorplan(
                title="All heads on one prompt",
                caption=(
                    "Rows are layers, columns heads; in each map a row shows what one token looks at. A bright column "
                    "is a sink, a bright diagonal a head that looks at its own token. Click on a map to see it large."
                ),
                prompts=_prompt_names(material),
                heads=codes.sizes["head"],
                scale=_scale(),
                pixels=_pixels(list(passes.values()), codes.sizes["head"]),
                has_data=bool((codes != UNKNOWN).any()),
            )
        )
    looped = material.view.looped
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
    """Of a map: the most with which blocks of so many layers, as many side by side as fit, are no higher than they may
    be."""
    (width, height), (beside, above) = _PLAN, _AROUND
    for pixels in range(_LARGEST, _SMALLEST, -1):
        columns = max(1, width // (heads * pixels + beside))
        if sum(max(layers[at : at + columns]) * pixels + above for at in range(0, len(layers), columns)) <= height:
            return pixels
    return _SMALLEST


def _data(material: Material) -> dict[str, Any]:
    """What maps.js needs."""
    codes = material.view.dataset["attention_map"].values
    causal = not bool(_future(codes).any())
    if causal:
        # No token, like what lies beyond the prompt: not the colour of a token that is not looked at.
        codes = codes.copy()
        codes[..., *np.triu_indices(codes.shape[-1], 1)] = UNKNOWN
    names, numbers = _numbers(material)
    start = _first_shown(numbers, names)
    sites = _sites(material)
    return {
        "side": codes.shape[-1],
        "heads": codes.shape[2],
        "highest": HIGHEST,
        "unknown": UNKNOWN,
        "palette": _palette(),
        "visits": [
            {
                "layer": f"{site.stage}.{site.layer}",
                "number": site.layer,
                "pass": _pass_name(site, material.view.looped),
                "recurrence": site.recurrence + 1,
            }
            for site in sites
        ],
        "start": {"layer": f"{sites[start[0]].stage}.{sites[start[0]].layer}", "head": start[1]},
        "prompts": [
            {
                "tokens": [visible_text(str(token), 12) for token in material.tokens[prompt]["token_strings"]],
                "note": _note(material, prompt),
                "codes": _packed(codes[index]),
                "numbers": _packed(numbers[index]),
            }
            for index, prompt in enumerate(_prompts(material))
        ],
        "names": names,
    }


def _numbers(material: Material) -> tuple[list[str], NDArray[np.float32]]:
    """Names of the numbers that the study has of each head, and (prompt, visit, head, number)."""
    data = material.view.dataset.isel(prompt=_prompts(material))
    sites = _sites(material)
    found: dict[str, NDArray[np.floating]] = {}
    if "sink_score" in data:
        places = {site: depth for depth, site in enumerate(sites_of(data))}
        chosen = data.isel(depth=[places[site] for site in sites])
        found = {name: chosen[name].transpose("prompt", "depth", "head").values for name in _NUMBERS}
    if "attention_change" in data:
        by_row = data["attention_change"] / np.sqrt(data["token_count"])
        change = by_row.transpose("prompt", "layer", "recurrence", "head").values
        of_visit = np.full((change.shape[0], len(sites), change.shape[-1]), np.nan)
        for place, site in enumerate(sites):
            if site.stage == "recurrent":
                of_visit[:, place] = change[:, site.layer, site.recurrence]
        found["change"] = of_visit
    shape = (len(data["prompt"]), len(sites), material.view.dataset.sizes["head"], len(found))
    numbers = np.stack(list(found.values()), axis=-1) if found else np.empty(shape)
    return list(found), numbers.astype(np.float32)


def _first_shown(numbers: NDArray[np.float32], names: list[str]) -> tuple[int, int]:
    """Visit and head that the page opens with: of the first prompt the one that changes most, or sinks most."""
    for name in ("change", "sink_score"):
        if name in names:
            values = np.nan_to_num(numbers[0, ..., names.index(name)], nan=-1.0, posinf=-1.0)
            if values.max() > 0:
                visit, head = np.unravel_index(int(values.argmax()), values.shape)
                return int(visit), int(head)
    return 0, 0


def _note(material: Material, prompt: int) -> str:
    """What has to be said of a prompt's maps."""
    data = material.view.dataset
    total, shown = int(data["token_count"][prompt]), data.sizes["query"]
    said = []
    if shown < total:
        said.append(f"Of its {total} tokens the first {shown} are drawn: the study keeps the maps of no more.")
    said += sinks_by_chance([total]) if "sink_score" in data else []
    return " ".join(said)


def _prompts(material: Material) -> list[int]:
    return [int(prompt) for prompt in material.view.dataset["mapped_prompt"].values]


def _prompt_names(material: Material) -> list[str]:
    """As in `Prompt 3: Ann has ...`."""
    names = []
    for prompt in _prompts(material):
        entry = material.tokens[prompt]
        text = entry["text"] or "".join(map(str, entry["token_strings"]))
        names.append(f"Prompt {prompt}: {visible_text(str(text), 70)}")
    return names


def _sites(material: Material) -> list[Site]:
    data = material.view.dataset
    columns = (data[f"map_{name}"].values for name in ("stage", "layer", "recurrence"))
    return [Site(str(stage), int(layer), int(recurrence)) for stage, layer, recurrence in zip(*columns, strict=True)]


def _pass_name(site: Site, looped: bool) -> str:
    """What the visits of one block have in common."""
    if not looped:
        return "all layers"
    return f"recurrence {site.recurrence + 1}" if site.stage == "recurrent" else site.stage


def _layer_name(key: str, looped: bool) -> str:
    stage, _, layer = key.partition(".")
    return f"{stage} {layer}" if looped else f"layer {layer}"


def _future(codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether a token looks at a later one, for the entries where it could."""
    later = codes[..., *np.triu_indices(codes.shape[-1], 1)]
    return (later != 0) & (later != UNKNOWN)


def _palette() -> list[tuple[int, int, int]]:
    """A colour for each code but the unknown one."""
    colours = sample_colorscale(SEQUENTIAL, [code / HIGHEST for code in range(HIGHEST + 1)])
    return [(int(red), int(green), int(blue)) for red, green, blue in map(unlabel_rgb, colours)]


def _scale() -> ColourScale:
    colours = [_palette()[round(place)] for place in np.linspace(0, HIGHEST, _STOPS)]
    return ColourScale(
        gradient=", ".join(f"rgb({red}, {green}, {blue})" for red, green, blue in colours),
        ticks=[(100 * math.sqrt(value), f"{100 * value:g} %" if value else "0") for value in _TICKS],
    )


def _packed(values: NDArray[Any]) -> str:
    """Bytes, numbers little-endian, compressed (zlib), as base64."""
    plain = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(plain.tobytes(), 9)).decode()
