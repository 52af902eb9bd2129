"""Studies whose stage measures have given curves, for comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope import Comparison
from loopscope.answers.answer import Answer
from loopscope.answers.comparison.findings import comparison_answers
from loopscope.study import Study
from synthetic_study import contracting, feed_forward_study, looped_study

Array = NDArray[np.float64]
Layout = tuple[int, int, int]

SHAPE = np.array([0.2, 0.9, 0.4, 0.7, 0.1, 0.8, 0.3, 0.6])
OTHER = np.array([0.5, 0.1, 0.3, 0.9, 0.8, 0.2, 0.6, 0.4])


def staged_study(
    passes: Sequence[Array] | Sequence[float] | Array,
    layout: Layout = (8, 0, 0),
    *,
    model: str = "model",
    prompts: str = "questions.txt",
    trained: int | None = None,
    without: Sequence[str] = (),
) -> Study:
    """A study whose every measure but the sink rate, which is 0, has these curves (one per recurrence, over prelude,
    block and coda) as its medians over three prompts."""
    prelude, recurrent, coda = layout
    curves = np.atleast_2d(np.asarray(passes))
    loop = curves[:, prelude : prelude + recurrent].ravel()
    values = np.concatenate([curves[0, :prelude], loop, curves[0, prelude + recurrent :]])
    sites = [("prelude", layer, 0) for layer in range(prelude)]
    sites += [("recurrent", layer, at) for at in range(1, len(curves) + 1) for layer in range(recurrent)]
    sites += [("coda", layer, 0) for layer in range(coda)]
    of_prompt = values[:, None] + np.array([-0.01, 0.0, 0.05])
    of_head = np.repeat(of_prompt[:, None], 2, axis=1)
    data: dict[str, Any] = {
        "colsum_concentration": (("depth", "head", "prompt"), of_head),
        "relative_mixing_score": (("depth", "head", "prompt"), of_head),
        "sink_score": (("depth", "head", "prompt"), 0 * of_head),
        "relative_residual_entropy": (("depth", "prompt"), of_prompt),
        "mean_token_norm": (("depth", "prompt"), of_prompt),
        "massive_activation": (("depth", "prompt"), 10**of_prompt),
        "token_count": ("prompt", np.full(3, 50)),
        "diverged_at": ("prompt", np.full(3, -1)),
        **{
            f"depth_{name}": ("depth", list(column))
            for name, column in zip(("stage", "layer", "recurrence"), zip(*sites, strict=True), strict=True)
        },
    }
    base = looped_study(contracting(), prompts=3, recurrences=4, horizon=4) if recurrent else feed_forward_study(3)
    if recurrent:
        # What a study of a looped model always has; of no matter here.
        names = (
            "relative_step",
            "relative_distance",
            *(name for name in base.dataset if str(name).startswith("horizon")),
        )
        for name in (*names, "degeneracy"):
            dims = [dim for dim in base.dataset[name].dims if dim in ("layer", "recurrence", "prompt", "horizon")]
            sizes = {"layer": recurrent, "recurrence": len(curves), "prompt": 3, "horizon": 2}
            data[str(name)] = dims, np.zeros([sizes[str(dim)] for dim in dims])
        data["horizon"] = ["first", "second"]
    manifest = {**base.manifest}
    manifest["model"] = {
        **manifest["model"],
        "name": model,
        "weights_sha256": model,
        "layout": {"prelude": prelude, "recurrent": recurrent, "coda": coda},
        "trained_recurrences": trained,
    }
    manifest["prompts"] = {"source": prompts, "count": 3, "tokens": 150, "sha256": prompts}
    dataset = xarray.Dataset({name: value for name, value in data.items() if name not in without})
    tokens = [{**entry, "token_ids": [1] * 50, "token_strings": ["a"] * 50} for entry in base.tokens]
    return Study(dataset, manifest, tokens)


def answer_of(comparison: Comparison, key: str) -> Answer:
    return next(answer for answer in comparison_answers(comparison) if answer.key == key)


def at(comparison: Comparison, name: str, study: str, span: str, recurrence: int = 0) -> Array:
    return np.asarray(comparison.dataset[name].sel(study=study, span=span).isel(recurrence=recurrence).values)
