"""What the script of the attention maps is given: bytes of maps and the numbers of their heads, compressed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plotly.colors import sample_colorscale, unlabel_rgb

from loopscope._util.map_codes import HIGHEST, UNKNOWN
from loopscope._util.sites import Site
from loopscope._util.wording import visible
from loopscope.answers.limits import sinks_by_chance
from loopscope.report.figures.look import SEQUENTIAL
from loopscope.report.figures.plot import packed
from loopscope.study import StudyView, sites_of

_NUMBERS = ("sink_score", "strongest_sink", "strongest_sink_position", "mixing_score")


def map_data(view: StudyView) -> dict[str, Any]:
    """What maps.js needs."""
    codes = shown_codes(view)
    names, numbers = _numbers(view)
    start = _first_shown(numbers, names)
    sites, looped = mapped_sites(view), view.looped
    return {
        "side": codes.shape[-1],
        "heads": codes.shape[2],
        "highest": HIGHEST,
        "unknown": UNKNOWN,
        "palette": palette(),
        "visits": [
            {
                "layer": f"{site.stage}.{site.layer}",
                "number": site.layer,
                "recurrence": site.recurrence,
                "pass": pass_name(site, looped),
                "name": pass_name(site, looped) if site.stage == "recurrent" else layer_name(site, looped),
            }
            for site in sites
        ],
        "start": {"layer": f"{sites[start[0]].stage}.{sites[start[0]].layer}", "head": start[1]},
        "prompts": [
            {
                "tokens": [visible(str(token), 12) for token in view.study.tokens[prompt]["token_strings"]],
                "note": _note(view, prompt),
                "codes": _packed(_changes(codes[index], sites)),
                "numbers": _packed(numbers[index]),
            }
            for index, prompt in enumerate(mapped_prompts(view))
        ],
        "names": names,
    }


def _numbers(view: StudyView) -> tuple[list[str], NDArray[np.float32]]:
    """Names of the numbers that the study has of each head, and (prompt, visit, head, number)."""
    data = view.dataset.isel(prompt=mapped_prompts(view))
    sites = mapped_sites(view)
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
                of_visit[:, place] = change[:, site.layer, site.recurrence - 1]
        found["change"] = of_visit
    shape = (len(data["prompt"]), len(sites), view.dataset.sizes["head"], len(found))
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


def _note(view: StudyView, prompt: int) -> str:
    """What has to be said of a prompt's maps."""
    data = view.dataset
    total, shown = int(data["token_count"][prompt]), data.sizes["query"]
    said = []
    if shown < total:
        said.append(f"The first {shown} of its {total} tokens are drawn; the study keeps no more of the maps.")
    said += sinks_by_chance([total]) if "sink_score" in data else []
    return " ".join(said)


def _changes(codes: NDArray[np.uint8], sites: list[Site]) -> NDArray[np.uint8]:
    """The codes of a prompt, less those of the same layer one visit before, modulo 256: half as long once compressed,
    since maps hardly change from recurrence to recurrence."""
    changes, last = codes.copy(), dict[tuple[str, int], int]()
    for visit, site in enumerate(sites):
        if (before := last.get((site.stage, site.layer))) is not None:
            changes[visit] -= codes[before]
        last[site.stage, site.layer] = visit
    return changes


def mapped_prompts(view: StudyView) -> list[int]:
    return [int(prompt) for prompt in view.dataset["mapped_prompt"].values]


def mapped_sites(view: StudyView) -> list[Site]:
    return sites_of(view.dataset, "map")


def pass_name(site: Site, looped: bool) -> str:
    """What the visits of one block have in common."""
    if not looped:
        return "all layers"
    return f"recurrence {site.recurrence}" if site.stage == "recurrent" else site.stage


def layer_name(site: Site, looped: bool) -> str:
    """`recurrent 2`; a feed-forward model has one stage, which needs no name."""
    return f"{site.stage} {site.layer}" if looped else f"layer {site.layer}"


def shown_codes(view: StudyView) -> NDArray[np.uint8]:
    """The maps, (prompt, visit, head, query, key). Where no token looks at a later one these are unknown, like what
    lies beyond the prompt: not the colour of a token that is not looked at."""
    codes: NDArray[np.uint8] = view.dataset["attention_map"].values
    later = np.triu_indices(codes.shape[-1], 1)
    if not np.isin(codes[..., *later], (0, UNKNOWN)).all():
        return codes
    codes = codes.copy()
    codes[..., *later] = UNKNOWN
    return codes


@lru_cache(maxsize=1)
def palette() -> list[tuple[int, int, int]]:
    """A colour for each code but the unknown one."""
    colours = sample_colorscale(SEQUENTIAL, [code / HIGHEST for code in range(HIGHEST + 1)])
    return [(int(red), int(green), int(blue)) for red, green, blue in map(unlabel_rgb, colours)]


def _packed(values: NDArray[Any]) -> str:
    """Numbers little-endian."""
    return packed(values.astype(values.dtype.newbyteorder("<")).tobytes())
