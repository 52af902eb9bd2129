"""One cell of a grid: a random model, run and measured; and what any study says of a model's dynamics."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import torch

from loopscope._util.statistics import finite_or_none, median
from loopscope.analysis.analyzing import analyze
from loopscope.analysis.settings import Part, parts_except
from loopscope.answers.answer import Criterion
from loopscope.answers.settled import shares_point
from loopscope.answers.settling import Settling, common_settling
from loopscope.dynamics.prediction import KNOWN_CODES, PREDICTED_KINDS
from loopscope.dynamics.verdicts import KINDS
from loopscope.experiments.cells import Cell, CellOutcome, CellResult
from loopscope.experiments.designs import NormName
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.free_memory import check_memory
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.study import Study, view_study

_VOCABULARY = 256
_HEAD = 32
_MLP_RATIO = 4
_NORMS: dict[NormName, dict[str, Any]] = {
    "pre": {"norm_placement": "pre"},
    "residual": {"norm_placement": "residual", "loop_norm": "loop"},
    "ouro": {"norm_placement": "branch-in-out", "loop_norm": "recurrence"},
    "olmo2": {"norm_placement": "branch-out"},
}
_SEARCH, _LONG_SEARCH = 40, 200
"""Recurrences for finding a fixed point that the run does not come to: half of those that repel are found with the
first; with the second, for cells whose tokens are judged, nearly all that are found at all."""
_CURVE_POINTS = 24


def run_cell(cell: Cell) -> CellResult:
    """Analyse the cell's model; a function of the cell alone, so that any process may do it."""
    started = time.monotonic()
    kept: tuple[Part, ...] = ("noise-floor", "stability", "behaviour") if cell.judged else ("noise-floor", "stability")
    study = analyze(
        _model(cell),
        _prompts(cell),
        recurrences=cell.recurrences,
        horizon=cell.recurrences,
        horizon_method="keep",
        batch_size=cell.prompts,
        seed=cell.seed,
        judged_layers="last" if cell.judged else "all",
        eigenvalue_search=_LONG_SEARCH if cell.judged else _SEARCH,
        track=(),
        skip=parts_except(*kept),
    )
    found = dynamics_of(study, Criterion())
    return CellResult(**found, cell=cell, seconds=round(time.monotonic() - started, 2))


def architecture_of(cell: Cell) -> Architecture:
    """(0, depth (x) R, 0), with heads of 32 and an MLP four times as wide; Huginn's random initial state where the
    prompt is injected, else the embeddings themselves."""
    return Architecture(
        vocab_size=_VOCABULARY,
        width=cell.width,
        heads=cell.width // _HEAD,
        kv_heads=cell.width // _HEAD,
        head_dim=_HEAD,
        mlp_width=_MLP_RATIO * cell.width,
        prelude=0,
        recurrent=cell.depth,
        coda=0,
        recurrences=cell.recurrences,
        injection=cell.injection,
        # Entries of size 1, as large as those of a random state, however small the weights: what is injected has to be
        # seen beside what the layers add.
        embedding_scale=1 / cell.std,
        state_init="embeddings" if cell.injection == "none" else "normal",
        **_NORMS[cell.norm],
    )


def dynamics_of(study: Study, criterion: Criterion) -> dict[str, Any]:
    """The fields of `Dynamics`, of a study with eigenvalues and, perhaps, verdicts."""
    view = view_study(study)
    data = study.dataset
    common = common_settling(view, criterion)
    shown = np.unique(np.geomspace(1, view.recurrences, _CURVE_POINTS).round().astype(int))
    distance = data["relative_distance"].max("layer").transpose("recurrence", "prompt").values
    norms = data["residual_norm"].isel(layer=-1).transpose("recurrence", "prompt").values
    with np.errstate(invalid="ignore", divide="ignore"):
        growth = norms / norms[:1]
    kinds = data["predicted_kind"].values
    known = np.isin(kinds, KNOWN_CODES)
    rates, errors = data["predicted_rate"].values[known], data["predicted_rate_error"].values[known]
    verdicts = data["verdict"].isel(judged_layer=-1).values if "verdict" in data else np.empty(0, dtype=int)
    return {
        "outcome": _outcome(common, shares_point(data, criterion), criterion),
        "settling": "depends on the prompt" if common is None else str(common),
        "degeneracy": _median(data["degeneracy"].values),
        "drift": _median(data["horizon_drift"].max("layer").values),
        "norm_growth": _median(data["horizon_norm_growth"].max("layer").values),
        "counts": tuple(int(count) for count in shown),
        "distance": tuple(_median(distance[count - 1]) for count in shown),
        "norm": tuple(_median(growth[count - 1]) for count in shown),
        "radius": finite_or_none(rates.max()) if rates.size else None,
        "radius_median": _median(rates),
        "radius_error": finite_or_none(errors[rates.argmax()]) if rates.size else None,
        "predicted": _counted(kinds, [str(kind) for kind in PREDICTED_KINDS]),
        "observed_rate": _median(data["observed_rate"].values),
        "verdicts": _counted(verdicts, [str(kind) for kind in KINDS]),
    }


def _outcome(common: Settling | None, shared: np.ndarray, criterion: Criterion) -> CellOutcome:
    if common is None:
        return CellOutcome.CANNOT_TELL
    known = shared[np.isfinite(shared)]
    if known.size and known.mean() >= criterion.prompts_needed and common is not Settling.DIVERGED:
        return CellOutcome.DEGENERATE
    if common.settles:
        return CellOutcome.FIXED_POINT
    others = {
        Settling.NOT_YET: CellOutcome.NOT_YET,
        Settling.CANNOT_TELL: CellOutcome.CANNOT_TELL,
        Settling.DIRECTION_ONLY: CellOutcome.DIRECTION,
    }
    return others.get(common, CellOutcome.NONE)


def _median(values: np.ndarray) -> float | None:
    return finite_or_none(median(values))


def _counted(codes: np.ndarray, names: list[str]) -> dict[str, int]:
    counts = Counter(codes[codes >= 0].ravel().tolist())
    return {name: counts[place] for place, name in enumerate(names) if counts[place]}


def _model(cell: Cell) -> NativeSubject:
    architecture = architecture_of(cell)
    check_memory(architecture.parameters, torch.float32, torch.device("cpu"))
    model = LoopedTransformer(architecture).initialize(cell.seed, cell.std)
    with torch.no_grad():
        if model.injection is not None:
            # W = [on the state ; on the prompt]: only the prompt's share is scaled.
            model.injection.weight[:, cell.width :] *= cell.injection_scale
        elif cell.injection == "add":
            # What is added are the embeddings, and nothing else reads them before the loop.
            model.embedding.weight *= cell.injection_scale
    return NativeSubject(model.eval().requires_grad_(False), name=cell.name)


def _prompts(cell: Cell) -> list[list[int]]:
    generator = torch.Generator().manual_seed(cell.seed)
    ids = torch.randint(0, _VOCABULARY, (cell.prompts, cell.tokens), generator=generator)
    return [[int(token) for token in row] for row in ids]
