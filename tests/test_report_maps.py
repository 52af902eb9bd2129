"""Attention maps in a report: what the page holds, for the script that draws them. Drawing is tested in a browser."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from loopscope.measures.heads import CHANGE_NAMES, HEAD_NAMES
from loopscope.study import Study
from report_page import Page, page_of, unpacked
from synthetic_study import contracting, feed_forward_study, looped_study


def sites_of(study: Study, kind: str) -> list[tuple[str, int, int]]:
    columns = [study.dataset[f"{kind}_{name}"].values.tolist() for name in ("stage", "layer", "recurrence")]
    return list(zip(*columns, strict=True))


def maps_of(page: Page) -> dict[str, Any]:
    """What the page gives the script that draws attention maps."""
    found: dict[str, Any] = next(json.loads(text) for each, text in page.scripts if each.get("id") == "attention-maps")
    return found


def array_of(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(unpacked(text), dtype=dtype)


def codes_of(data: dict[str, Any], prompt: int) -> np.ndarray:
    """Of all maps of a prompt, which the page holds less those of the same layer one visit before, modulo 256."""
    codes = array_of(data["prompts"][prompt]["codes"], "u1").reshape(len(data["visits"]), -1).copy()
    layers = [visit["layer"] for visit in data["visits"]]
    for visit, layer in enumerate(layers):
        if layer in layers[:visit]:
            codes[visit] += codes[visit - 1 - layers[:visit][::-1].index(layer)]
    return codes.ravel()


@pytest.mark.parametrize("make", [lambda: looped_study(contracting()), feed_forward_study], ids=["looped", "plain"])
def test_the_page_holds_every_map_of_the_study_once(make: Callable[[], Study], tmp_path: Path) -> None:
    study = make()
    page = page_of(study, tmp_path)
    assert {"head-maps", "floorplan"} <= page.ids("figure")
    data, stored = maps_of(page), study.dataset["attention_map"]
    (prompt,) = data["prompts"]
    codes = codes_of(data, 0).reshape(stored.shape[1:])
    later = np.triu(np.ones(codes.shape[-2:], dtype=bool), 1)
    assert (codes[..., later] == data["unknown"]).all()  # what a token cannot look at has no colour
    np.testing.assert_array_equal(codes[..., ~later], stored.values[0][..., ~later])
    assert len(data["palette"]) == 255
    assert prompt["tokens"] == study.tokens[0]["token_strings"]
    visits, sites = (sites_of(study, kind) for kind in ("map", "depth"))
    assert [visit["layer"] for visit in data["visits"]] == [f"{stage}.{layer}" for stage, layer, _ in visits]
    # The numbers below the maps are those of the prompt, at the same visits.
    numbers = array_of(prompt["numbers"], "<f4").reshape(*codes.shape[:2], len(data["names"]))
    for place, visit in enumerate(visits):
        expected = study.dataset["sink_score"].values[sites.index(visit), :, 0]
        np.testing.assert_array_equal(numbers[place, :, data["names"].index("sink_score")], expected)
        if "change" in data["names"]:
            change = np.full(2, np.nan)
            if visit[0] == "recurrent":
                change = study.dataset["attention_change"].values[visit[1], visit[2] - 1, :, 0] / np.sqrt(10)
            np.testing.assert_allclose(numbers[place, :, data["names"].index("change")], change, rtol=1e-6)


def test_attention_to_what_follows_is_drawn(tmp_path: Path) -> None:
    study = feed_forward_study()
    study.dataset["attention_map"][0, 1, 0, 2, 5] = 200
    codes = codes_of(maps_of(page_of(study, tmp_path)), 0)
    np.testing.assert_array_equal(codes, study.dataset["attention_map"].values.ravel())


def test_layers_without_a_map_cannot_be_chosen(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=2)
    hidden = (study.dataset["map_stage"] == "recurrent") & (study.dataset["map_layer"] == 1)
    study.dataset["attention_map"][:, hidden] = 255
    found = page_of(study, tmp_path)
    keys = [attributes["value"] for tag, attributes in found.elements if tag == "option"]
    assert keys == ["prelude.0", "recurrent.0", "recurrent.2", "coda.0", "0", "1", "shared", "own", "shared", "own"]
    study.dataset["attention_map"][:] = 255
    assert not page_of(study, tmp_path).ids("figure") & {"head-maps", "floorplan"}


def test_maps_of_several_prompts_can_be_chosen_and_say_what_they_lack(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=3)
    both = xarray.concat([study.dataset["attention_map"]] * 2, "mapped").assign_coords(mapped_prompt=("mapped", [0, 2]))
    both[1, ..., 7:, :] = both[1, ..., 7:] = 255
    dataset = study.dataset.drop_vars(["attention_map", "mapped_prompt"]).assign(attention_map=both)
    dataset["token_count"][:] = [30, 10, 7]
    found = page_of(dataclasses.replace(study, dataset=dataset), tmp_path)
    notes = [prompt["note"] for prompt in maps_of(found)["prompts"]]
    assert notes[0] == "The first 10 of its 30 tokens are drawn; the study keeps no more of the maps."
    assert notes[1].startswith("This prompt has so few tokens (7) that")
    assert "Prompt 2: Two apples cost three coins ." in found.words


def test_a_study_without_maps_says_so_where_they_would_be(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=2)
    found = page_of(dataclasses.replace(study, dataset=study.dataset.drop_vars("attention_map")), tmp_path)
    assert "head-change" in found.figures
    assert not found.ids("figure") & {"head-maps", "floorplan"}
    assert "The study holds no maps of single heads" in found.words
    assert "Click on" not in found.words


def test_maps_are_shown_without_the_measures_of_heads(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=2)
    dropped = [*HEAD_NAMES, *CHANGE_NAMES, "head_stable_from", "attention_cycle_distance"]
    found = page_of(dataclasses.replace(study, dataset=study.dataset.drop_vars(dropped)), tmp_path)
    assert {"head-maps", "floorplan"} <= found.ids("figure")
    assert maps_of(found)["names"] == []


def test_short_prompts_are_warned_of_where_sinks_are_shown(tmp_path: Path) -> None:
    """In the limits, and beside each figure of sinks."""
    warning = "40 of 40 prompts have so few tokens (9 at most)"
    looped, plain = looped_study(contracting(), tokens=9), feed_forward_study(tokens=9)
    for study, readings in ((looped, ["% of their attention. "]), (plain, ["% of their attention. ", "from 0.3 on. "])):
        words = page_of(study, tmp_path).words
        for reading in readings:
            assert reading + warning in words
        assert words.split("What limits these answers")[-1].count(warning) == 1
    assert "so few tokens" not in page_of(looped_study(contracting()), tmp_path).words


def test_tokens_reach_the_script_of_the_maps_as_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    study = looped_study(contracting(), prompts=2)
    tokens = [{**entry, "token_strings": [hostile, " \n", "\u202eabc", *["x"] * 7]} for entry in study.tokens]
    page = page_of(dataclasses.replace(study, tokens=tokens), tmp_path)
    assert maps_of(page)["prompts"][0]["tokens"][:4] == ["<script>ale…", " ⏎", "·abc", "x"]
    raw = next(line for line in (tmp_path / "report.html").read_text().splitlines() if 'id="attention-maps"' in line)
    assert raw.count("<") == 2  # the element's own
