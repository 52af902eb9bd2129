"""The arrays of a study as tidy tables: a row for each token, visit, head or prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

_VISIT = ["prompt", "stage", "layer", "recurrence"]


def study_frames(dataset: xr.Dataset, tokens: Sequence[Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """By name: `prompts`, `tokens`, `readouts` (a token after a number of recurrences), `visits`, `heads` (of a visit).

    A variable is a column of the frame whose rows are its dimensions; those of other dimensions (maps, trajectories,
    quantiles) are in no frame. Codes become words where the study says what they mean, as older ones do not. Of
    verdicts, which tokens have in each judged layer, there are those of the last one. Rows beyond a prompt's end are
    left out, and frames of which a study has nothing are absent.
    """
    chosen = dataset.isel({dim: -1 for dim in ("judged_layer", "site") if dim in dataset.dims}, drop=True)
    words = {name: _words(variable) for name, variable in chosen.data_vars.items() if "flag_meanings" in variable.attrs}
    chosen = chosen.assign(words)
    found = {
        "prompts": _rows(chosen, "prompt"),
        "tokens": _rows(chosen, "prompt", "token"),
        "readouts": _rows(chosen, "prompt", "token", "readout_recurrence"),
        "visits": _visits(chosen),
        "heads": _visits(chosen, "head"),
    }
    texts = pd.DataFrame(
        [
            {
                "prompt": prompt,
                "token": place,
                "token_id": entry["token_ids"][place],
                "token_string": string,
                "generated": place >= len(entry["token_ids"]) - (entry.get("generated_tokens") or 0),
            }
            for prompt, entry in enumerate(tokens)
            for place, string in enumerate(entry["token_strings"])
        ]
    )
    ids = pd.DataFrame(
        [{"prompt": prompt, "id": entry["id"], "text": entry["text"]} for prompt, entry in enumerate(tokens)]
    )
    for name, labels in (("prompts", ids), ("tokens", texts), ("readouts", texts)):
        if not found[name].empty:
            # Inner, so that what pads shorter prompts goes.
            found[name] = labels.merge(found[name])
    return {name: frame for name, frame in found.items() if not frame.empty}


def _rows(dataset: xr.Dataset, *dims: str) -> pd.DataFrame:
    """What has these dimensions, and no others."""
    names = [name for name, variable in dataset.data_vars.items() if set(variable.dims) == set(dims)]
    if not names:
        return pd.DataFrame()
    frame = dataset[names].to_dataframe(dim_order=list(dims)).reset_index()
    return frame.rename(columns={f"depth_{part}": part for part in ("stage", "layer", "recurrence")})


def _visits(dataset: xr.Dataset, *more: str) -> pd.DataFrame:
    """Rows for the visits of all layers, with what is only known of those in the loop."""
    everywhere = _rows(dataset, "prompt", "depth", *more)
    looped = _rows(dataset, "prompt", "layer", "recurrence", *more)
    each = _rows(dataset, "prompt", "layer", *more) if more else pd.DataFrame()
    if not looped.empty and not each.empty:
        looped = looped.merge(each)
    keys = [*_VISIT, *more]
    found = everywhere if looped.empty else looped.assign(stage="recurrent")
    if not (everywhere.empty or looped.empty):
        found = everywhere.merge(found, how="left", on=keys)
    return found if found.empty else found[keys + [name for name in found.columns if name not in (*keys, "depth")]]


def _words(variable: xr.DataArray) -> xr.DataArray:
    """The meanings of codes; empty for a code that means nothing."""
    meanings = [*(word.replace("_", " ") for word in variable.attrs["flag_meanings"].split()), ""]
    codes = variable.values
    known = (codes >= 0) & (codes < len(meanings) - 1)
    return variable.copy(data=np.array(meanings, dtype=object)[np.where(known, codes, -1)])
